"""Runs test files one process each, several at a time; what examples/gpu_suite.sh runs the `gpu` tests with.

    python -m tests.helpers.file_by_file --seconds 150 --at-once 6 tests/kernels tests/gpu -- -m gpu

A kernel that writes where it must not spoils every later call of its process ("CUDA error"), and one that never ends
its run: here that costs its own file. A failing test is told with its traceback the moment it fails, so that it is in
the log though its process is ended later. The exit code is the number of files that did not pass.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

NONE_SELECTED = 5  # pytest's code where a file has no test of the marker
POLL_SECONDS = 0.2


class TellsAtOnce:
    """A pytest plugin: each failure as it happens; -v names each test before it runs."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's part is over."""
        if report.failed:
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\nFAILED AT ONCE {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    """Loaded by `-p`."""
    config.pluginmanager.register(TellsAtOnce(config))


@dataclass
class Run:
    """A file's process."""

    path: Path
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    started: float

    def end(self, ended: bool) -> str:
        """What is said of it; `ended`: it was not done in time."""
        if ended:
            self.process.kill()
        code = self.process.wait()
        self.output.seek(0)
        told = self.output.read().decode(errors="replace")
        self.output.close()
        outcome = "not done in time" if ended else f"exit code {code}"
        return f"---- {self.path}: {outcome}, {time.monotonic() - self.started:.0f} s\n{told}"


def main() -> int:
    """The number of files that did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="test files, or folders of such; behind --: for pytest")
    parser.add_argument("--seconds", type=float, required=True, help="of the whole run")
    parser.add_argument("--at-once", type=int, default=4, help="processes (default 4)")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, options = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    waiting = [file for path in arguments.paths for file in (sorted(path.rglob("test_*.py")) or [path])]
    deadline = time.monotonic() + arguments.seconds
    running: list[Run] = []
    failed: list[str] = []
    while waiting or running:
        over = time.monotonic() > deadline
        while waiting and not over and len(running) < arguments.at_once:
            running.append(start(waiting.pop(0), options))
        for run in [run for run in running if over or run.process.poll() is not None]:
            running.remove(run)
            ended = run.process.poll() is None
            print(run.end(ended), flush=True)
            if ended or run.process.returncode not in (0, NONE_SELECTED):
                failed.append(str(run.path))
        if over:
            failed += [f"{path} (not begun)" for path in waiting]
            waiting.clear()
        time.sleep(POLL_SECONDS)
    print("\n".join(["---- files that did not pass:", *failed]) if failed else "---- every file passed", flush=True)
    return min(len(failed), 100)


def start(path: Path, options: list[str]) -> Run:
    """Begins a file."""
    output = tempfile.TemporaryFile()
    command = [sys.executable, "-m", "pytest", "-v", "--tb=no", "-rN", "--durations=0", "-p", "no:cacheprovider"]
    command += ["-p", "tests.helpers.file_by_file", *options, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    return Run(path, process, output, time.monotonic())


if __name__ == "__main__":
    sys.exit(main())
