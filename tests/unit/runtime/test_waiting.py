"""Who waits at a terminal is told what for; nobody else is."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.cli.commands import COMMANDS
from megatron_vlm.runtime import waiting
from tests.helpers.ranks.processes import ROOT, environment

AT_ONCE = "import sys; from megatron_vlm.runtime import waiting; waiting.SILENT_SECONDS = 0.0; "
QUICK = {"config", "launch"}  # they import nothing that takes time; what `launch` starts speaks for itself


class Terminal:
    """A stream that is one, or is not."""

    def __init__(self, is_one: bool = True) -> None:
        self.is_one, self.written = is_one, ""

    def isatty(self) -> bool:
        return self.is_one

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None:
        pass


def told(monkeypatch: pytest.MonkeyPatch, stream: Terminal, seconds: float, rank: str = "0") -> str:
    """What is written while something takes that long, of which a twentieth of a second is silence."""
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    with waiting.told_if_slow("loading \x1bcats"):
        time.sleep(seconds)
    time.sleep(0.1)
    return stream.written


def test_only_what_is_slow_is_told_and_only_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, Terminal(), 0.3) == "loading \\x1bcats ...\n"
    assert told(monkeypatch, Terminal(), 0.0) == ""
    assert told(monkeypatch, Terminal(is_one=False), 0.3) == ""
    assert told(monkeypatch, Terminal(), 0.3, rank="1") == ""


def test_nothing_is_told_of_what_failed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with pytest.raises(ValueError, match="gone"), waiting.told_if_slow("loading cats"):
        raise ValueError("gone")
    time.sleep(0.1)
    assert stream.written == ""


def test_every_command_that_takes_time_tells() -> None:
    for name in COMMANDS.keys() - QUICK:
        source = (ROOT / "megatron_vlm" / "cli" / f"{name.replace('-', '_')}.py").read_text()
        assert re.search(r"with told_if_slow\(", source), name


def test_a_command_at_a_terminal(tmp_path: Path) -> None:
    """One that loads torch, with no patience; then the same with its stderr in a file."""
    (tmp_path / "data.json").write_text("[]")
    words = ["data", "tokenizer", str(tmp_path / "data.json"), str(tmp_path / "out")]
    program = f"{AT_ONCE}from megatron_vlm.cli.main import main; sys.argv[1:] = {words}; main()"
    ours, theirs = pty.openpty()
    line = [sys.executable, "-c", program]
    done = subprocess.run(
        line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=theirs, timeout=120, check=False
    )
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 1 and seen.startswith(f"making a tokenizer of {tmp_path}/data.json ...\r\nerror: ")
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.startswith(b"error: ")
