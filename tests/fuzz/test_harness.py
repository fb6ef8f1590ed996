"""The fuzzer finds what it looks for: every verdict is given to a reader that deserves it."""

import json
import subprocess
import sys
from typing import get_args

import pytest

from tests.fuzz.planted import READERS
from tests.fuzz.verdicts import Kind
from tests.helpers.ranks.processes import ROOT


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    """In a process without threads: it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.planted"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", READERS)
def test_each_reader_gets_its_verdict(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name] == READERS[name][0]


def test_each_verdict_can_be_given() -> None:
    assert {expected for expected, _ in READERS.values()} == set(get_args(Kind))
