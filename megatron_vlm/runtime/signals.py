"""Signals that ask a job to save and end (SIGTERM, SIGUSR1, Ctrl-C), and processes that are to take no notice of them.

A job manager signals every process it knows of, at different moments, while ranks may only stop together: so a signal
is noted at once and acted upon after a step, when all ranks have agreed on it. Before the first step there is nothing
to save, and the process ends at once, even from inside a collective: the note is taken by a thread of its own, which
reads what Python's C handler writes into a pipe; Python's own handlers wait until the main thread is back from C. A
rank that ends so tells the others, which would wait for it. A second Ctrl-C ends at once, whatever is lost.

A rank's children (data workers, the writer of a checkpoint) get the same signals and would die of them in the middle of
the last step: they are started with all blocked. A mask, not an ignored signal: it outlives `exec`, it is kept by
torch's data workers, which set handlers of their own, and a signal that comes meanwhile waits instead of being lost.

Hazards: torchrun, once it is told to end, kills its ranks after a time of its own, 30 s: a longer step is lost then. It
also sends SIGTERM to the ranks that are left when one has died. They cannot finish their step; so one
that was asked to end and then loses its peers ends at once, without a word: torchrun has told already.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_vlm.runtime.failure import end_others, kind_of
from megatron_vlm.runtime.launch import Launch, ends_ranks_after
from megatron_vlm.runtime.logging import get_logger

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT
_PAUSE = b"\0"  # in the pipe, no signal's number
REPEAT_SECONDS = 1.0  # a Ctrl-C may arrive twice: from the terminal, and from a launcher that passes it on

logger = get_logger(__name__)


class StopSignals:
    """Notes the signals while the context is open. One that was never entered has never seen any.

    Args:
        launch: this rank's place.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()
        self.seen = 0  # number of the last one noted
        self._armed = False
        self._interrupted = 0.0

    def arm(self) -> None:
        """Starts to note signals; before, a signal ended the process."""
        self._armed = True

    def agreed(self, group: "ProcessGroup") -> str | None:
        """The name of a signal that any rank has seen, the same on every rank; a collective call."""
        from megatron_vlm.runtime.collectives import all_reduce_max  # imports torch; signals are noted before that

        return name_of(all_reduce_max([self.seen], group)[0])

    def __enter__(self) -> "StopSignals":
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        # A shell's background job begins with Ctrl-C ignored: it is meant for another.
        heard = [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGINT, signal.SIG_IGN)]
        self._handlers: dict[signal.Signals, Any] = {number: signal.signal(number, _leave_it) for number in heard}
        self._wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._start()
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No thread notes signals inside, so that the process may be forked; what arrives is noted afterwards."""
        os.write(self._writable, _PAUSE)
        self._thread.join()
        try:
            yield
        finally:
            self._start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.seen in (signal.SIGTERM, signal.SIGINT) and kind_of(error) == "echo":
            os._exit(1)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
        os.close(self._writable)  # the thread reads the end
        self._thread.join()
        os.close(self._readable)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while (noted := os.read(self._readable, 1)) not in (b"", _PAUSE):
            number = noted[0]
            if number not in SIGNALS:  # others that Python has handlers for
                continue
            name = name_of(number)
            if not self._armed:
                logger.info("stopped by %s before the first step: nothing to save", name)
                sys.stdout.flush()
                code = INTERRUPTED if number == signal.SIGINT else 0
                end_others(self.launch, code)
                os._exit(code)
            if number == signal.SIGINT and self._is_second():
                logger.info("interrupted again: ending at once, without a save")
                sys.stdout.flush()
                os._exit(INTERRUPTED)
            if not self.seen:
                logger.info("%s: saving after this step, then ending%s", name, _for_how_long(number))
            if number == signal.SIGINT and not self._interrupted:
                self._interrupted = time.monotonic()  # once it is told: what came meanwhile came together with it
            self.seen = number

    def _is_second(self) -> bool:
        """Whether a Ctrl-C was noted well before this one."""
        return 0 < self._interrupted < time.monotonic() - REPEAT_SECONDS


def _for_how_long(number: int) -> str:
    """Events that may come in between, as text."""
    seconds = ends_ranks_after()
    if seconds is None or number == signal.SIGUSR1:
        return "; Ctrl-C ends at once" if number == signal.SIGINT else ""
    return (
        f"; torchrun, if it got the signal too, kills its ranks {seconds} s later, and what they have not saved is lost"
    )


def name_of(number: int) -> str | None:
    """SIGTERM for 15; None for 0."""
    return signal.Signals(number).name if number else None


@contextmanager
def kept_from_children(with_tracker: bool = False) -> Iterator[None]:
    """A process started inside never gets these signals, nor do its own children.

    Args:
        with_tracker: multiprocessing's resource tracker is wanted by the process (a fork server). It is started first,
            because it unblocks some of them when it is up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if with_tracker:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class BeginAsChild:
    """Sent to a child by `multiprocessing` and called there first: gives it the environment that its parent has now,
    and has it end when the parent does, however that ends.

    A fork server's children have the server's environment, which is that of its start. They are not the kernel's
    children of the rank that asked for them: they outlive it.
    """

    def __init__(self) -> None:
        self.environment = dict(os.environ)

    def __call__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        parent = multiprocessing.parent_process()
        assert parent is not None, "called in child processes"

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, name="end with the parent", daemon=True).start()


def _leave_it(number: int, frame: Any) -> None:
    """Python's handler; the pipe has been written to before it runs."""
