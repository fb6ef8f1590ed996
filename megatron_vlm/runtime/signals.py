"""Signals that ask a job to save and end (SIGTERM, SIGUSR1), and the processes that are to take no notice of them.

A job manager signals every process it knows of, at different moments, while ranks may only stop together: so a signal
is noted at once and acted upon after a step, when all ranks have agreed on it. Before the first step there is nothing
to save, and the process ends at once, even from inside a collective: the note is taken by a thread of its own, which
reads what Python's C handler writes into a pipe; Python's own handlers wait until the main thread is back from C.

A rank's children (data workers, the writer of a checkpoint) get the same signals and would die of them in the middle of
the last step: they are started with both blocked. A mask, not an ignored signal: it outlives `exec`, it is kept by
torch's data workers, which set handlers of their own, and a signal that comes meanwhile waits instead of being lost.

Hazard: torchrun also sends SIGTERM to the ranks that are left when one has died. They cannot finish their step; so one
that was asked to end and then loses its peers ends at once, without a word: torchrun has told already.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_vlm.runtime.failure import kind_of
from megatron_vlm.runtime.logging import get_logger

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

logger = get_logger(__name__)


class StopSignals:
    """Notes the signals while the context is open. One that was never entered has never seen any."""

    def __init__(self) -> None:
        self.seen = 0  # number of the last one noted
        self._armed = False

    def arm(self) -> None:
        """From now on a signal is noted; before, it ended the process."""
        self._armed = True

    def agreed(self, group: "ProcessGroup") -> str | None:
        """The name of a signal that any rank has seen, the same on every rank; a collective call."""
        return name_of(maxima([self.seen], group)[0])

    def __enter__(self) -> "StopSignals":
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        self._handlers: dict[signal.Signals, Any] = {number: signal.signal(number, _leave_it) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.seen == signal.SIGTERM and kind_of(error) == "echo":
            os._exit(1)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
        os.close(self._writable)  # the thread reads the end
        self._thread.join()
        os.close(self._readable)

    def _watch(self) -> None:
        while noted := os.read(self._readable, 1):
            if noted[0] not in SIGNALS:  # others that Python has handlers for
                continue
            if not self._armed:
                logger.info("stopped by %s before the first step: nothing to save", name_of(noted[0]))
                sys.stdout.flush()
                os._exit(0)
            self.seen = noted[0]


def maxima(values: list[int], group: "ProcessGroup") -> list[int]:
    """The largest of every rank's values, place by place; a collective call, without cost for one rank."""
    import torch

    from megatron_vlm.runtime.collectives import all_reduce_
    from megatron_vlm.runtime.device import current_device

    if group.size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int32, device=current_device())
    return all_reduce_(tensor, group, torch.distributed.ReduceOp.MAX).tolist()


def name_of(number: int) -> str | None:
    """SIGTERM for 15; None for 0."""
    return signal.Signals(number).name if number else None


@contextmanager
def kept_from_children(with_tracker: bool = False) -> Iterator[None]:
    """A process started inside never gets SIGTERM or SIGUSR1, nor do its own children.

    Args:
        with_tracker: multiprocessing's resource tracker is wanted by the process (a fork server). It is started first,
            because it unblocks SIGTERM when it is up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if with_tracker:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Has this process, a child by `multiprocessing`, end when its parent does, however that ends.

    A fork server's children are not the kernel's children of the rank that asked for them: they outlive it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in child processes"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end with the parent", daemon=True).start()


def _leave_it(number: int, frame: Any) -> None:
    """Python's handler; the pipe has been written to before it runs."""
