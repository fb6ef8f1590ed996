"""The samples of each step: pure functions of (the samples, seed, step).

Samples follow one another in epochs, each its own permutation; step t takes the next `global_batch_size` of that
endless sequence, across the end of an epoch where it falls there. So nothing is dropped, every sample comes once per
epoch, and the loader's whole state is one number, on any layout. `grouped.py` and `packing.py` have plans of their own.

A permutation sorts the raw output of a bit generator, which numpy promises never to change; `Generator.permutation`
carries no such promise, and a resumed run must see the order it would have seen.
"""

from functools import lru_cache
from typing import Protocol

import numpy as np


class RowPlan(Protocol):
    """The part of a plan that the loader must know."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""

    def samples_by_row(self, step: int) -> list[tuple[int, ...]]:
        """The sample numbers of each row of a step's global batch."""


class Plan:
    """The order of samples.

    Args:
        num_samples: in the data set.
        seed: of the run.
        global_batch_size: rows per step.
        shuffle: False keeps file order in every epoch.
    """

    def __init__(self, num_samples: int, seed: int, global_batch_size: int, shuffle: bool = True) -> None:
        assert num_samples > 0 and global_batch_size > 0
        self.num_samples = num_samples
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.shuffle = shuffle

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, one a sample."""
        return self.num_samples

    def rows(self, step: int) -> list[int]:
        """The sample numbers of a step's global batch, in row order."""
        rows: list[int] = []
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        while position < end:
            epoch, start = divmod(position, self.num_samples)
            taken = min(end - position, self.num_samples - start)
            rows += self._take(epoch, start, start + taken)
            position += taken
        return rows

    def samples_by_row(self, step: int) -> list[tuple[int, ...]]:
        """The same, as `RowPlan` has it."""
        return [(sample,) for sample in self.rows(step)]

    def _take(self, epoch: int, start: int, end: int) -> list[int]:
        """A part of an epoch's sequence."""
        if not self.shuffle:
            return list(range(start, end))
        return permute(self.num_samples, self.seed, epoch)[start:end].tolist()


@lru_cache(maxsize=2)  # a step touches at most one epoch's end
def permute(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples), int64."""
    return np.argsort(draw_raw((seed, epoch), num_samples), kind="stable")


def draw_raw(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """[count] uint64 of a bit generator of its own."""
    return np.random.PCG64(np.random.SeedSequence(list(entropy))).random_raw(count)
