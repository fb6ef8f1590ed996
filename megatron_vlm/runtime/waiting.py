"""A word to who waits at a terminal: what a command does, where it has said nothing for two seconds.

    with told_if_slow("loading torch and transformers"):
        import torch

Imports, models and comparisons take seconds to minutes before the first line. Logs and scripts get nothing of it: the
line goes to stderr, and only where that is a terminal.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from megatron_vlm.errors import shown

SILENT_SECONDS = 2.0
LIBRARIES = "loading torch, transformers and megatron-core"


@contextlib.contextmanager
def told_if_slow(what: str) -> Iterator[None]:
    """Says on a terminal, once, what is done inside where it takes long; rank 0 alone does.

    Args:
        what: what is done, as in "loading runs/cats".
    """
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(SILENT_SECONDS, _tell, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # no thread is left of it: the process may be forked next


def _tell(what: str) -> None:
    sys.stderr.write(f"{shown(what)} ...\n")
    sys.stderr.flush()
