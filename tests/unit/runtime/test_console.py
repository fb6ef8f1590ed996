"""Logging and progress: rank 0 tells, the others only warn, and nothing of ours goes to stderr."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_vlm.runtime.progress import Progress

PROGRAM = """
from megatron_vlm.runtime.logging import get_logger, quiet_libraries
quiet_libraries()
logger = get_logger("megatron_vlm.somewhere")
logger.info("told by %d", 0)
logger.warning("warned [of this]")
import warnings, logging
warnings.warn("library noise")
logging.getLogger("transformers.models").warning("more noise")
"""


@pytest.mark.parametrize(
    ("rank", "told"), [("0", ["told by 0", "warned [of this]"]), ("2", ["rank 2: warned [of this]"])]
)
def test_who_tells_what(rank: str, told: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"RANK": rank, "PATH": ""}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(told) and all(text in line for text, line in zip(told, lines, strict=True))


QUIETED = """
import logging, sys
sys.path.insert(0, sys.argv[1])
from megatron_vlm.runtime.logging import get_logger, quietly
get_logger("megatron_vlm").setLevel(logging.WARNING)  # as generate.py and evaluate.py do
from megatron_vlm.config.extensions import import_extensions
with quietly():
    get_logger("megatron_vlm.somewhere").info("not told")
    import_extensions(["of_mine"])
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_whose_code_is_run_is_told_where_all_else_is_quiet(rank: str, tmp_path: Path) -> None:
    (tmp_path / "of_mine.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", QUIETED, tmp_path], env={"RANK": rank, "PATH": ""}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == (rank == "0") and all(f"extension of_mine: {tmp_path / 'of_mine.py'}" in one for one in lines)


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with Progress("training", total=4, completed=1, line_interval_seconds=0) as bar:
        bar.update(2, "loss 1.5000")
        bar.advance(2, "loss 1.2000")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["training 2/4", "loss 1.5000"],
        ["training 4/4", "loss 1.2000"],
    ]
    assert lines[-1].endswith("0 s left")


def test_lines_come_now_and_then_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with Progress("indexing", total=1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "indexing 1/1000",
        "indexing 1000/1000",
    ]


def test_other_ranks_and_disabled_bars_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress("training", total=1, enabled=False) as bar:
        bar.update(1)
    monkeypatch.setenv("RANK", "1")
    with Progress("training", total=1) as bar:
        bar.update(1)
    assert capsys.readouterr().out == ""


def test_control_characters_and_markup_are_told_not_sent(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with Progress("indexing [/x].json\x1b]0;owned\x07", total=1) as bar:
        bar.advance(facts="loss [red]\x1b[1m :smile:")
    told = capsys.readouterr().out
    assert r"indexing [/x].json\x1b]0;owned\x07 1/1" in told and r"loss [red]\x1b[1m :smile:" in told
    assert "\x1b" not in told


def test_a_bar_on_a_terminal_takes_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich formats its columns as markup by default, and fails at a closing tag that was never opened."""
    monkeypatch.delenv("RANK", raising=False)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr("megatron_vlm.runtime.progress.stdout_console", lambda: terminal)
    with Progress("indexing [/x].json\x1b]0;owned", total=2) as bar:
        bar.update(2, "[/y]")
    told = terminal.file.getvalue()
    assert "[/x].json" in told and "[/y]" in told and "\x1b]0;" not in told


def test_a_log_line_sends_nothing() -> None:
    call = r"get_logger('megatron_vlm').warning('a [/b] %s', '\x1b]0;')"
    program = f"from megatron_vlm.runtime.logging import get_logger; {call}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert r"a [/b] \x1b]0;" in done.stdout and "\x1b" not in done.stdout
