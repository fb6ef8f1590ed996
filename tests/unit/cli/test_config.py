"""`megatron-vlm config`: what it prints, what a mistyped key costs, and that it imports nothing heavy."""

import subprocess
import sys

import pytest

from megatron_vlm.cli import config as command
from megatron_vlm.config import reference
from tests.helpers.ranks.processes import ROOT, environment

SEEN = """
import sys
from megatron_vlm.cli.config import main
sys.argv[:] = ["megatron-vlm config", *sys.argv[1:]]
main()
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "heavy"
"""


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `megatron-vlm config` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["megatron-vlm config", *arguments])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], reference.tree()),
        (["parallel"], reference.explain("parallel")),
        (["data.packing"], reference.explain("data.packing")),
        (["--markdown"], reference.markdown().rstrip("\n")),
    ],
)
def test_what_is_asked_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert ask(monkeypatch, *arguments) == 0
    assert capsys.readouterr() == (f"{text}\n", "")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["parallel.tensr"], "did you mean 'parallel.tensor'"),
        (["--markdown", "data"], "--markdown: found together with 'data', needs one of the two"),
        (["data", "model"], "unrecognized arguments: model"),
    ],
)
def test_a_mistake_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    assert ask(monkeypatch, *arguments) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1 and hint in told.err


def test_it_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEEN, "data.packing"], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("data.packing: `auto`, `samples`, `rows`"), done.stderr
