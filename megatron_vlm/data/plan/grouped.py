"""Epochs ordered as LLaVA's sampler does (`data.group_by_modality_length`): a batch has either images in all of its
samples or in none, and samples of similar length, so that little of a step is padding.
"""

from typing import Protocol

import numpy as np

from megatron_vlm.data.plan.order import Plan, draw_raw, permute

POOL_BATCHES = 50  # samples are sorted by length among so many batches' worth; all of them: every epoch would be alike


class Lengths(Protocol):
    """Lengths by which samples are grouped: two [n] integer arrays, as `SampleIndex` has them."""

    @property
    def tokens(self) -> np.ndarray:
        """Length of each."""

    @property
    def images(self) -> np.ndarray:
        """Images of each."""


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


def group_epoch(samples: Lengths, seed_and_epoch: tuple[int, int], head: int, batch_size: int) -> np.ndarray:
    """One epoch's order [n], int64: `head` leftover samples, then whole batches, then the other leftovers."""
    permutation = permute(len(samples.tokens), *seed_and_epoch)
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
    batches = batches[np.argsort(draw_raw((*seed_and_epoch, 1), len(batches)), kind="stable")]
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
