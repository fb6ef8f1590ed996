"""What a kind of input is: a base that is good, and how it is spoilt and read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Read = Callable[[], object]


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Args:
        name: of it.
        share: inputs of 5,000.
        prepare: makes what is good, once, in a folder; no threads, no process group, for what follows is forked.
        make: with (random numbers, what `prepare` gave, a new folder) writes one input there and returns what reads it
            through the product, in a process of its own whose working directory is the folder.
        may_read_outside: names in the input that lead out of its folder may be followed.
    """

    name: str
    share: int
    prepare: Callable[[Path], Any]
    make: Callable[[Random, Any, Path], Read]
    may_read_outside: bool = False
