"""One console for a whole job: rank 0 tells what happens, the other ranks only warnings.

Everything goes to stdout: stderr is kept for the one line that says why a job failed (DESIGN 5), so libraries that warn
there are quieted. The hazard is import order: `quiet_libraries` sets variables that torch and transformers read when
they are imported, so tools call it (through `fail_together`) first. rich is imported where something is told, so that
tools/doctor.py runs without it.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_vlm.errors import shown

if TYPE_CHECKING:
    from rich.console import Console

_ROOT = "megatron_vlm"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (`__name__`), below the package's own, which gets its console handler on first use."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        root.addHandler(_ConsoleHandler())
        root.setLevel(_usual_level())
        root.propagate = False
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


def get_unquieted_logger(name: str) -> logging.Logger:
    """The same for what must be told whatever else is quiet, such as whose code is run."""
    logger = get_logger(name)
    logger.setLevel(_usual_level())
    return logger


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _usual_level() -> int:
    return logging.INFO if _rank() == 0 else logging.WARNING


class _ConsoleHandler(logging.Handler):
    """rich's handler, which is imported and made for the first line that is told."""

    @cached_property
    def _handler(self) -> logging.Handler:
        from rich.logging import RichHandler

        rank = _rank()
        handler = RichHandler(console=stdout_console(), show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(_Shown("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        self._handler.emit(record)


class _Shown(logging.Formatter):
    """A message may quote a file's name or a record: nothing of it is sent to the terminal as control."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def stdout_console(width: int = 200) -> "Console":
    """A console on stdout, which takes no text for markup.

    Args:
        width: columns where there is no terminal; by default lines are long enough to stay whole.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=width)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences libraries in a script that has stdout and stderr to itself: their warnings are off, and the package says
    nothing but its own."""
    logger = get_logger(_ROOT)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quiet_libraries() -> None:
    """Library warnings off, so that stderr stays for our own errors. Before torch and transformers are imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # children's: a rank that is ended leaks semaphores, by design
    warnings.simplefilter("ignore")
    for library in ("torch", "transformers", "megatron"):
        logging.getLogger(library).setLevel(logging.ERROR)
