"""The server that data workers and checkpoint writers are forked from, itself forked from the rank.

multiprocessing starts its fork server as a new interpreter, which imports torch and transformers once more for every
rank: 3 s of processor time each. Here the server is a fork of the rank that has just imported them.

The hazard is the reason why there is a server: a fork copies locks that other threads hold, and a GPU's driver does not
work in a copy. So it is forked once, early: after the imports, before the device is prepared, process groups are made
or anything is computed, while no other thread of Python's runs (`StopSignals.paused`; failure.py's watcher starts with
the device). The server keeps nothing of the rank: not its handles, not its signal handlers. Whatever stands against it,
an extension's thread for one, leaves multiprocessing's own server in place, which starts when it is first needed.

docs/decisions/0010 has the reasons and the figures.
"""

import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import arbitrary_address  # type: ignore[attr-defined]
from typing import Any

from megatron_vlm.runtime import device
from megatron_vlm.runtime.garbage import freeze_gc
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.signals import SIGNALS, StopSignals, kept_from_children
from megatron_vlm.runtime.waiting import LIBRARIES, told_if_slow

GPU_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")  # open where a driver is in use
END_SECONDS = 1.0  # at most, from a thread's last word to Python until the kernel has ended it

logger = get_logger(__name__)


def start_forked(modules: Sequence[str], signals: StopSignals) -> None:
    """Imports modules, then forks multiprocessing's server of this process, which has them; says why where it cannot.

    Args:
        modules: what its children need.
        signals: of this process; noted by no thread during the fork.
    """
    num_libraries_own = _threads_of_numpy()
    with told_if_slow(LIBRARIES):
        for name in modules:
            importlib.import_module(name)
    with signals.paused():
        found = obstacle(num_libraries_own)
        if found is None:
            _fork()
    if found is not None:
        logger.info("data workers and checkpoint writers import everything once more: %s", found)


def obstacle(num_libraries_own: int = 0) -> str | None:
    """Reason why this process must not be forked now; None where it may.

    Args:
        num_libraries_own: threads that libraries end by themselves for a fork, and start again when they need them.
    """
    if forkserver._forkserver._forkserver_address is not None:  # type: ignore[attr-defined]
        return "there is a fork server already"
    if device.is_prepared():
        return "the device is prepared"
    others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if others:
        return f"thread {', '.join(others)} runs"
    deadline = time.monotonic() + END_SECONDS
    while (more := _count_threads() - 1 - num_libraries_own) > 0 and time.monotonic() < deadline:
        time.sleep(END_SECONDS / 100)
    if more > 0:
        return f"{more} threads run that a library has started"
    if any(path.startswith(GPU_FILES) for path in _open_files().values()):
        return "a GPU is in use"
    return None


def _fork() -> None:
    """Makes the fork, and tells multiprocessing of it."""
    server: Any = forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as listener, kept_from_children(with_tracker=True):
        address = arbitrary_address("AF_UNIX")
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        alive_reader, alive_writer = os.pipe()  # each client has the writing end: the server ends when all are gone
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _serve(listener.detach(), alive_reader)
        os.close(alive_reader)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_writer, pid


def _serve(listener: int, alive_reader: int) -> None:
    """The life of the server; never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:  # as in a new interpreter; they stay blocked
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _leave_files_to_the_rank({0, 1, 2, listener, alive_reader})
        resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None  # type: ignore[attr-defined]
        freeze_gc()  # a collection would write to, and so copy, every page that it shares with the rank
        forkserver.main(listener, alive_reader, [])
    except SystemExit:  # no client is left
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _leave_files_to_the_rank(kept: set[int]) -> None:
    """Points all other handles at nothing. They are not closed: an object of the rank's that closes its own later would
    close whatever has its number by then."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in _open_files():
        if handle not in {*kept, nothing}:
            os.dup2(nothing, handle, inheritable=False)
    os.close(nothing)


def _open_files() -> dict[int, str]:
    """Open files of this process, by handle."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    return found


def _threads_of_numpy() -> int:
    """The threads that importing numpy starts: OpenBLAS's, which ends them for a fork (`pthread_atfork`). 0 where numpy
    was imported before."""
    before = _count_threads()
    import numpy  # noqa: F401

    return _count_threads() - before


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))
