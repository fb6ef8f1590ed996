"""Limits on the processor time and memory that anybody's text can make a library use.

A recipe's aliases, its regexes and a chat template can each keep a library busy for ever, or have it fill the memory:

    bounded(lambda: re.search("^(a+)+$", name))    # LimitError after 10 s

The time is the process's own, by a timer of the kernel: a busy machine does not make an honest input fail, and `re` and
the arithmetic of large integers, which no other thread can interrupt, look for signals while they compute. The memory
is a limit of the process's data, as far above what it has.

Hazard: Python handles signals in the main thread alone, which is where ranks and their data workers read. In any other
thread only the memory is bounded. And what other threads allocate meanwhile counts too, so the room left is large.
"""

import os
import resource
import signal
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
SECONDS = 10.0  # of processor time: the slowest honest input takes some hundredths of one
MEMORY_BYTES = 1 << 30
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class LimitError(ValueError):
    """It took more time or memory than it may."""


class _TimeIsUp(BaseException):
    """No Exception: a library that goes on after any of those is stopped all the same."""


class _Timer:
    """The process's own: how many calls are being timed, one inside the other."""

    depth = 0

    def stop(self, *_: object) -> None:
        if self.depth:
            raise _TimeIsUp


_timer = _Timer()


def bounded(function: Callable[[], T], seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> T:
    """Calls a function within limits, and returns its result. Costs about 10 us.

    Args:
        seconds: of processor time.
        memory_bytes: more than the process has.

    Raises:
        LimitError: it was stopped; or whatever the function raises.
    """
    try:
        if threading.current_thread() is threading.main_thread():
            return _in_time(function, seconds, memory_bytes)
        return _in_memory(function, memory_bytes)
    except _TimeIsUp as error:
        raise LimitError(f"it takes more than {seconds:g} s of processor time") from error
    except MemoryError as error:
        raise LimitError(f"it takes more than {memory_bytes:,} bytes of memory") from error


def _in_time(function: Callable[[], T], seconds: float, memory_bytes: int) -> T:
    _handle_signals(os.getpid())
    _timer.depth += 1
    left = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, where a destructor swallowed the first
    try:
        return _in_memory(function, memory_bytes)
    finally:
        _insist(lambda: signal.setitimer(signal.ITIMER_VIRTUAL, *left))
        _timer.depth -= 1


def _in_memory(function: Callable[[], T], memory_bytes: int) -> T:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    has = int(os.pread(_open_statm(os.getpid()), 200, 0).split()[5]) * _PAGE_BYTES
    if soft != resource.RLIM_INFINITY and soft <= has + memory_bytes:
        return function()
    resource.setrlimit(resource.RLIMIT_DATA, (has + memory_bytes, hard))
    try:
        return function()
    finally:
        _insist(lambda: resource.setrlimit(resource.RLIMIT_DATA, (soft, hard)))


def _insist(function: Callable[[], Any]) -> None:
    """Tries until it is done: time may be up in the middle of it."""
    while True:
        try:
            function()
            return
        except _TimeIsUp:
            continue


@cache
def _handle_signals(_process: int) -> None:
    """Once in each process; the handler stays, because setting it takes longer than all the rest."""
    signal.signal(signal.SIGVTALRM, _timer.stop)


@cache
def _open_statm(_process: int) -> int:
    """A handle, for as long as the process lives, of what it has of the memory that RLIMIT_DATA counts."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
