"""Python's collector of reference cycles, told what need not be looked through.

Importing torch and transformers makes very many objects that stay; looking through them time and again for garbage took
7 to 28% of the processor time of importing them and reading a config, in three pairs of runs.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_PYTHONS_OWN = gc.get_threshold()
SELDOM = (100_000, 20, 20)


def spare_imports() -> None:
    """Collect seldom, while a program starts."""
    gc.set_threshold(*SELDOM)


@contextmanager
def not_collected() -> Iterator[None]:
    """No collection inside, where many objects are made and no cycles: half the time of reading `.metadata` went into
    looking through all there is."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def freeze_gc() -> None:
    """Collect as Python does, but leave alone all that is there now: what a long run makes in cycles is freed soon."""
    gc.freeze()
    gc.set_threshold(*_PYTHONS_OWN)
