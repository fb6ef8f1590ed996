"""Rank processes, seen from outside: those below a launcher, a torchrun, a node."""

import contextlib

import psutil


def ranks_below(pid: int) -> list[psutil.Process]:
    """The ranks under this process, without the ranks' own children, which inherit their environment."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "RANK" in process.environ() and "RANK" not in psutil.Process(process.ppid()).environ():
                found.append(process)
    return found
