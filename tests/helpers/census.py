"""Counts the processes that a run of tests starts: fresh interpreters, each with imports of its own, and forked ones.

A small process of its own looks at /proc four times a second and asks nothing of the tests; what lives shorter than
that is not seen, and costs little. Run as a script: `census.py PID`, which counts the descendants of PID until its
standard input says something or ends, and then prints the numbers as JSON.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

LOOK_SECONDS = 0.25
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass
class Census:
    """Processes below `root`, this one left out.

    A process is forked while it has its parent's command line; a program started in its place makes it another.
    """

    root: int
    commands: dict[tuple[int, str], bytes] = field(default_factory=dict)  # by pid and start, which make it unique
    seconds: dict[tuple[int, str], float] = field(default_factory=dict)
    forked: set[tuple[int, str]] = field(default_factory=set)

    def look(self) -> None:
        """Counts those that are there now. One that was below `root` once stays counted, whoever its parent is now."""
        parents, processes = {}, {}
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in (self.root, os.getpid()) and (now := _process(int(name))):
                parents[int(name)], start, seconds, command = now
                processes[int(name)] = (int(name), start), seconds, command
        lines = {self.root: _read(f"/proc/{self.root}/cmdline")} | {
            pid: line for pid, (_, _, line) in processes.items()
        }
        for pid, (process, seconds, command) in processes.items():
            if process not in self.commands and not self._is_below(pid, parents):
                continue
            if command != self.commands.get(process):
                (self.forked.add if command == lines.get(parents[pid]) else self.forked.discard)(process)
            self.commands[process], self.seconds[process] = command, seconds

    def numbers(self) -> dict[str, float]:
        """Interpreters started, processes forked from one, and the processor time of both in seconds."""
        pythons = {process for process, command in self.commands.items() if b"python" in command.partition(b"\0")[0]}
        return {
            "interpreters": len(pythons - self.forked),
            "forked": len(pythons & self.forked),
            "seconds": round(sum(self.seconds[process] for process in pythons), 1),
        }

    def _is_below(self, pid: int, parents: dict[int, int]) -> bool:
        while pid in parents:
            pid = parents[pid]
        return pid == self.root


def _process(pid: int) -> tuple[int, str, float, bytes] | None:
    """Parent, start, processor time in seconds and command line; None where it has ended."""
    command, stat = _read(f"/proc/{pid}/cmdline"), _read(f"/proc/{pid}/stat")
    if not (command and stat):
        return None
    words = stat.rpartition(b")")[2].split()  # from the third field on: a name may hold anything
    return int(words[1]), words[19].decode(), (int(words[11]) + int(words[12])) / TICKS_PER_SECOND, command


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


class Counter:
    """The counting process beside this one."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-E", __file__, str(os.getpid())]
        self._process = subprocess.Popen(  # a session of its own: Ctrl-C is pytest's
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def numbers(self) -> dict[str, float]:
        """Ends it; see `Census.numbers`."""
        said, _ = self._process.communicate(b"end\n")  # closing is not enough: children may hold the pipe, too
        numbers: dict[str, float] = json.loads(said)
        return numbers


def main() -> None:
    census = Census(int(sys.argv[1]))
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        census.look()
    with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
        print(json.dumps(census.numbers()), flush=True)


if __name__ == "__main__":
    main()
