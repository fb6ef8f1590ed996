"""The end of a command whose reader has gone, as in `megatron-vlm doctor | head -3`: silent, as Unix' own tools end.

Those are ended by SIGPIPE, which Python ignores: it raises BrokenPipeError instead, where something is written or, of
what was still buffered, when the interpreter ends. The signal's usual action would end a job for any connection that
breaks, so it stays ignored, and only stdout and stderr are asked whether somebody still reads them.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

CODE = 128 + signal.SIGPIPE  # what a shell tells of a process that the signal ended


@contextlib.contextmanager
def silent_without_reader() -> Iterator[None]:
    """A command's main part runs inside; what it has printed is flushed behind it.

    Raises:
        SystemExit: with `CODE`, where nobody reads its output any more. A failure that is told keeps its own code.
    """
    try:
        yield
    except BrokenPipeError:
        if not _let_go():
            raise
        raise SystemExit(CODE) from None
    except SystemExit as end:
        if _flushes() or end.code:
            raise
        raise SystemExit(CODE) from None
    if not _flushes():
        raise SystemExit(CODE)


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads."""
    return any(map(_is_unread, (sys.stdout, sys.stderr)))


def _flushes() -> bool:
    """Whether all that was printed reaches its reader."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return not _let_go()
    return True


def _let_go() -> bool:
    """Sends what nobody reads nowhere, so that the interpreter's own last flush meets no error; whether that was so."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        handle = stream.fileno()
    except (OSError, ValueError):  # a stream in memory, or closed
        return False
    poll = select.poll()
    poll.register(handle, 0)  # an error is told without being asked for
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
