"""The samples of each step: pure functions of (the samples, seed, step).

Samples follow one another in epochs, each its own permutation; step t takes the next `global_batch_size` of that
endless sequence, across the end of an epoch where it falls there. So nothing is dropped, every sample comes once per
epoch, and the loader's whole state is one number, on any layout.

`PackedPlan` does the same with rows that hold several samples each. The rows are made once, for all epochs, from the
samples' lengths and the seed (`packing.pack_rows`), so an epoch has the same number of rows each time and the rows of a
step need no history: packed anew in each epoch, step t would stand wherever the row counts of all earlier epochs put
it. A step is then `global_batch_size` rows and as many samples as these hold; an epoch is over when all rows were
trained once, and with them all samples. Samples that share a row share it in every epoch, which they do not notice.

`GroupedPlan` orders each epoch as LLaVA's sampler does (`group_by_modality_length`): a batch has either images in all
of its samples or in none, and samples of similar length, so that little of a step is padding.

A permutation sorts the raw output of a bit generator, which numpy promises never to change; `Generator.permutation`
carries no such promise, and a resumed run must see the order it would have seen.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from megatron_vlm.data.packing import attention_work, deal_work, pack_rows

POOL_BATCHES = 50  # samples are sorted by length among so many batches' worth; all of them: every epoch would be alike


class RowPlan(Protocol):
    """The part of a plan that the loader must know."""

    @property
    def packed_length(self) -> int | None:
        """Tokens of every row, where rows are packed."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""

    def samples_by_row(self, step: int) -> list[tuple[int, ...]]:
        """The sample numbers of each row of a step's global batch."""


class Lengths(Protocol):
    """Lengths by which samples are grouped: two [n] integer arrays, as `SampleIndex` has them."""

    tokens: np.ndarray
    images: np.ndarray


class Plan:
    """The order of samples.

    Args:
        num_samples: in the data set.
        seed: of the run.
        global_batch_size: rows per step.
        shuffle: False keeps file order in every epoch.
    """

    packed_length = None

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
        return _permutation(self.num_samples, self.seed, epoch)[start:end].tolist()


class GroupedPlan(Plan):
    """Batches of one modality and of similar lengths, in random order.

    What is left of either modality when its batches are full is mixed: in at most one batch, and where an epoch begins
    and ends inside a step. The rows of a batch are ordered so that data-parallel ranks get even shares (`deal_evenly`).

    Args:
        samples: their lengths and images.
        seed, global_batch_size: as `Plan`.
    """

    def __init__(self, samples: Lengths, seed: int, global_batch_size: int) -> None:
        super().__init__(len(samples.tokens), seed, global_batch_size)
        self.samples = samples
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs: a step touches at most one epoch's end

    def rows(self, step: int) -> list[int]:
        """The sample numbers of a step's global batch, in row order."""
        return deal_evenly(sorted(super().rows(step), key=lambda sample: (-int(self.samples.tokens[sample]), sample)))

    def _take(self, epoch: int, start: int, end: int) -> list[int]:
        if epoch not in self._orders:
            head = -epoch * self.num_samples % self.global_batch_size  # what the step begun in the last epoch wants
            order = group_epoch(self.samples, (self.seed, epoch), head, self.global_batch_size)
            self._orders = {epoch: order, **{e: o for e, o in self._orders.items() if e == epoch - 1}}
        return self._orders[epoch][start:end].tolist()


class PackedPlan:
    """Rows of several samples, in an order that gives micro-batches and data-parallel ranks even work.

    Args:
        tokens: [n] length of every sample.
        seed, global_batch_size, shuffle: as `Plan`; without `shuffle` samples keep the file's order as far as packing
            allows (`packing.POOL_ROWS`).
        row_length: tokens of every row, `packed_length`; no sample is longer.
        micro_batch_size: rows of a micro-batch; what a step trains does not depend on it.
        windows: of the language model's layers (`packing.attention_work`); nor on them.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seed: int,
        global_batch_size: int,
        row_length: int,
        micro_batch_size: int,
        shuffle: bool = True,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        order = np.argsort(_raw((seed, 0, 2), len(tokens)), kind="stable") if shuffle else np.arange(len(tokens))
        rows = pack_rows(tokens, order, row_length)
        self.packed_length, self.micro_batch_size = row_length, micro_batch_size
        self._rows = Plan(len(rows), seed, global_batch_size, shuffle)
        self._samples = np.concatenate(rows)
        self._ends = np.cumsum([len(row) for row in rows])
        starts = np.concatenate([[0], self._ends[:-1]])
        self._work = np.add.reduceat(attention_work(tokens, windows)[self._samples], starts)
        self.num_tokens = int(tokens.sum(dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Number of rows of an epoch."""
        return len(self._ends)

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that are none."""
        return 1 - self.num_tokens / (self.num_rows * self.packed_length)

    def __str__(self) -> str:
        steps = self.num_rows / self._rows.global_batch_size
        return (
            f"{len(self._samples):,} samples in {self.num_rows:,} rows of {self.packed_length:,} tokens, "
            f"{self.padding:.2%} of them padding; an epoch is {steps:,.1f} steps"
        )

    def samples_by_row(self, step: int) -> list[tuple[int, ...]]:
        """The sample numbers of each row of a step's global batch."""
        rows = self._rows.rows(step)
        dealt = deal_work(self._work[rows].tolist(), self.micro_batch_size)
        return [self._members(rows[number]) for number in dealt]

    def _members(self, row: int) -> tuple[int, ...]:
        start = self._ends[row - 1] if row else 0
        return tuple(self._samples[start : self._ends[row]].tolist())


def group_epoch(samples: Lengths, seed_and_epoch: tuple[int, int], head: int, batch_size: int) -> np.ndarray:
    """One epoch's order [n], int64: `head` leftover samples, then whole batches, then the other leftovers."""
    permutation = _permutation(len(samples.tokens), *seed_and_epoch)
    imaged = samples.images[permutation] > 0
    grouped, left = [], []
    for members in (permutation[imaged], permutation[~imaged]):
        num_grouped = len(members) - len(members) % batch_size
        pool = max(1, min(POOL_BATCHES, len(members) // batch_size // 4)) * batch_size
        for start in range(0, num_grouped, pool):
            together = members[start : min(start + pool, num_grouped)]
            grouped.append(together[np.argsort(samples.tokens[together], kind="stable")])
        left.append(members[num_grouped:])
    batches = np.concatenate([*grouped, permutation[:0]]).reshape(-1, batch_size)
    batches = batches[np.argsort(_raw((*seed_and_epoch, 1), len(batches)), kind="stable")]
    num_whole = max(0, len(permutation) - head) // batch_size  # one less than there are batches, where `head` needs it
    leftover = np.concatenate([*left, batches[num_whole:].flatten()])
    return np.concatenate([leftover[:head], batches[:num_whole].flatten(), leftover[head:]])


def deal_evenly(ordered: list[int]) -> list[int]:
    """Rows by length -> row order: dealt out in turn, any power of two of ranks gets nearly equal sums.

    The order must not depend on the layout, so nobody can be given the longest row still there, as LLaVA's even chunks
    do it. The Gray code's order does as well: of every 2, 4, 8 ... consecutive rows each rank has one, and which one
    turns round from one such group to the next.
    """
    places = (number ^ number >> 1 for number in range(1 << (len(ordered) - 1).bit_length()))
    return [ordered[place] for place in places if place < len(ordered)]


@lru_cache(maxsize=2)  # a step touches at most one epoch's end
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples), int64."""
    return np.argsort(_raw((seed, epoch), num_samples), kind="stable")


def _raw(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """[count] uint64 of a bit generator of its own."""
    return np.random.PCG64(np.random.SeedSequence(list(entropy))).random_raw(count)
