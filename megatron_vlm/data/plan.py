"""Which samples make which step: a pure function of (number of samples, seed, step).

Samples follow one another in epochs, each its own permutation; step t takes the next `global_batch_size` of that
endless sequence, across the end of an epoch where it falls there. So nothing is dropped, every sample comes once per
epoch, and the loader's whole state is one number, on any layout.

The permutation sorts the raw output of a bit generator, which numpy promises never to change; `Generator.permutation`
carries no such promise, and a resumed run must see the order it would have seen.
"""

from functools import lru_cache

import numpy as np


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

    def rows(self, step: int) -> list[int]:
        """The sample numbers of a step's global batch, in row order."""
        rows: list[int] = []
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        while position < end:
            epoch, start = divmod(position, self.num_samples)
            taken = min(end - position, self.num_samples - start)
            if self.shuffle:
                rows += _permutation(self.num_samples, self.seed, epoch)[start : start + taken].tolist()
            else:
                rows += range(start, start + taken)
            position += taken
        return rows


@lru_cache(maxsize=2)  # a step touches at most one epoch's end
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples), int64."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(raw, kind="stable")
