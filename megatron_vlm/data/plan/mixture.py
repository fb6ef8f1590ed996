"""The cycle of a mixture: the smallest number of epochs in which every source comes a whole number of times.

    weights      a 1, b 3, c 1/2         of 4, 2 and 6 samples
    cycle        2 epochs: a twice, b six times, c once: 8 + 12 + 6 = 26 entries
    entries      0 .. 7 are a's samples 0 .. 3, twice; 8 .. 19 are b's, six times; 20 .. 25 are c's, once

A plan (`order.py`, `grouped.py`, `packing.py`) orders the entries of a cycle as it would the samples of an epoch, anew
in each cycle, and `MixedPlan` says which samples they are. So weights are exact over every cycle, and the loader's
whole state stays one number. Samples are numbered over all sources, one source after the other.

Hazard: numbers of entries are not kept but computed, so a cycle of a billion costs nothing here; its order does, eight
bytes an entry in every process that plans. What fits no memory is refused.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_vlm.data.plan.order import RowPlan
from megatron_vlm.errors import DataError

MOST_ENTRIES = 2**26  # whose order is 512 MiB


class Cycle:
    """One cycle: how often the samples of each source come, and which number is whose.

    Args:
        sizes: samples of each source, at least one.
        weights: how often each of them comes in an epoch, above 0.

    Raises:
        DataError: the cycle has more entries than can be ordered.

    Attributes:
        num_epochs: of the cycle.
        repeats: how often each source comes in it.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction]) -> None:
        assert len(sizes) == len(weights) > 0 and min(sizes) > 0 and min(weights) > 0
        self.num_epochs = lcm(*(weight.denominator for weight in weights))
        self.repeats = tuple(int(weight * self.num_epochs) for weight in weights)
        self.num_samples = sum(sizes)
        num_entries = sum(size * repeats for size, repeats in zip(sizes, self.repeats, strict=True))
        if num_entries > MOST_ENTRIES and any(repeats > 1 for repeats in self.repeats):
            raise DataError(
                f"data.mixture: weights {', '.join(map(str, weights))} come out even after {self.num_epochs:,} epochs "
                f"alone, of {num_entries:,} samples together, needs at most {MOST_ENTRIES:,}: smaller weights, "
                "or weights with a smaller common denominator, such as 0.3 or 1/3 for 0.333"
            )
        self.sizes = np.array(sizes)
        self.ends = np.cumsum(self.sizes * np.array(self.repeats))

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def is_plain(self) -> bool:
        """Whether its entries are the samples themselves."""
        return set(self.repeats) == {1}

    def source_of(self, samples: np.ndarray) -> np.ndarray:
        """The source of each of some samples, [n] -> [n]."""
        return np.searchsorted(np.cumsum(self.sizes), samples, side="right")

    def samples(self, entries: np.ndarray) -> np.ndarray:
        """The sample of each of some entries, [n] -> [n] int64."""
        source = np.searchsorted(self.ends, entries, side="right")
        sizes = self.sizes[source]
        first_entries = self.ends[source] - sizes * np.array(self.repeats)[source]
        first_samples = np.cumsum(self.sizes)[source] - sizes
        return first_samples + (entries - first_entries) % sizes

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of samples [num_samples] -> of the entries [len(self)]."""
        return values if self.is_plain else values[self.samples(np.arange(len(self)))]


class MixedPlan:
    """A plan of a cycle's entries as one of samples.

    Args:
        entries: the plan.
        cycle: whose entries these are.
    """

    def __init__(self, entries: RowPlan, cycle: Cycle) -> None:
        self.entries, self.cycle = entries, cycle

    @property
    def num_rows(self) -> int:
        """Rows of a cycle."""
        return self.entries.num_rows

    def samples_by_row(self, step: int) -> list[tuple[int, ...]]:
        """The sample numbers of each row of a step's global batch."""
        rows = self.entries.samples_by_row(step)
        flat = iter(self.cycle.samples(np.array([entry for row in rows for entry in row])).tolist())
        return [tuple(next(flat) for _ in row) for row in rows]
