"""A command whose reader has gone ends as Unix' tools do; another broken pipe is a failure that is told."""

import os
import subprocess
import sys

import pytest

from megatron_vlm.runtime.pipes import CODE
from tests.helpers.ranks.processes import ROOT, environment

INSIDE = "from megatron_vlm.runtime.command_line import one_voice\nwith one_voice():\n    "
MODULE = ("-P", "-m", "megatron_vlm")


def ended(*words: str, unread_stderr: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a Python whose output nobody reads. (Unbuffered, argparse itself passes over it.)"""
    variables = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        errors = writer if unread_stderr else subprocess.PIPE
        line = [sys.executable, *words]
        done = subprocess.run(line, cwd=ROOT, env=variables, stdout=writer, stderr=errors, timeout=60, check=False)
    finally:
        os.close(writer)
    return done.returncode, "" if unread_stderr else done.stderr.decode()


@pytest.mark.parametrize(
    "words",
    [("--help",), ("--version",), ("train", "--help"), ("config",), ("config", "data.packing"), ("convert", "--help")],
)
def test_a_command_ends_silently(words: tuple[str, ...]) -> None:
    assert ended(*MODULE, *words) == (CODE, "")


@pytest.mark.parametrize("body", ["print('x' * 100_000)", "print('x')", "print('x'); raise SystemExit"])
def test_what_is_buffered_and_what_is_not(body: str) -> None:
    assert ended("-c", INSIDE + body) == (CODE, "")


def test_a_reader_of_both() -> None:
    assert ended(*MODULE, "--help", unread_stderr=True)[0] == CODE
    assert ended("-c", INSIDE + "print('x'); import sys; sys.stderr.write('y')", unread_stderr=True)[0] == CODE


def test_failures_keep_their_code_and_their_line() -> None:
    failing = "print('x')\n    from megatron_vlm.errors import DataError\n    raise DataError('why')"
    assert ended("-c", INSIDE + failing) == (1, "error: why\n")
    assert ended(*MODULE, "trian")[0] == 1


def test_another_pipe_that_breaks_is_told() -> None:
    """The wrong variant: stdout is read, and what breaks is a connection of ours."""
    line = [sys.executable, "-c", INSIDE + "raise BrokenPipeError(32, 'of a worker')"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "rank 0 failed" in done.stderr and "of a worker" in done.stderr
