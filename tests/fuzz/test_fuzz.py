"""No input ends in a traceback, blocks, fills the memory, writes outside or runs code.

A hundred inputs in the fast lane, 5,000 in the slow one (some 15 minutes on 2 cores).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks.processes import ROOT

FAST_INPUTS = 100
SLOW_INPUTS = 5_000
SLOW_SECONDS = 3 * 3600  # on a machine that does other things too


def fuzz(folder: Path, *options: str | int, timeout: int) -> dict[str, Any]:
    """In a process without threads: it forks. Returns what it counted."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--json", folder / "found.json", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert (folder / "found.json").exists(), done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert not found["faults"] and done.returncode == 0, done.stdout
    return found


def test_a_hundred_inputs(tmp_path: Path) -> None:
    found = fuzz(tmp_path, "--inputs", FAST_INPUTS, "--jobs", 2, timeout=280)
    assert found["inputs"] == FAST_INPUTS
    accepted = sum(count for name, count in found["numbers"].items() if name.endswith("accepted"))
    assert 0.05 < accepted / found["inputs"] < 0.8, "inputs that are all refused, or all good, try little"


@pytest.mark.slow
@pytest.mark.timeout(SLOW_SECONDS + 60)
def test_five_thousand_inputs(tmp_path: Path) -> None:
    found = fuzz(tmp_path, "--inputs", SLOW_INPUTS, "--seed", 1, "--jobs", os.cpu_count() or 1, timeout=SLOW_SECONDS)
    assert found["inputs"] == SLOW_INPUTS
