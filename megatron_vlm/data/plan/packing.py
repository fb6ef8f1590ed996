"""Several samples in one row: which go together, and in which order. Pure functions of lengths (DESIGN D10).

Every sample is a document of its own: attention does not leave it, position ids restart in it, and its last token
predicts nothing. So what is learnt from a sample does not depend on its neighbours, and packing is free to choose them.

Rows are filled first-fit-decreasing within a pool of the plan's order. A pool is counted in rows' worth of tokens,
so that what its last row leaves empty is little, whatever the lengths: 1,024 rows lose under a thousandth to it. (A
batch of 64 mixed samples packed by itself fills 13 or 14 rows of 4,096 tokens, and loses a twentieth.)

Rows of equal length differ in work, which for attention is the pairs of query and key of their documents. Two orders
make up for that, neither of which depends on the number of ranks, so every layout trains the same rows:

- `deal_work` orders a step's rows, so that micro-batches, and the shares of any number of data-parallel ranks, are of
  nearly equal work. (Rows of tools/benchmarks/media/draws.py: of 64 over 8 ranks the slowest has 1.02 times the mean,
  in random order 1.3; 48 over 3 ranks 1.01, 96 over 24 ranks 1.12.)
- `pack_rows` puts a row's longest document last, the second longest first and the others between, shortest first:
  under the zigzag of the ring (`parallel.layout`) the slowest of 2, 4, 8 ranks then has 1.11, 1.13, 1.15 times the
  mean (the same draw), in random order 1.19, 1.29, 1.35, and in the best of 30 random orders 1.10, 1.13, 1.13.

Hazard: a resumed run must find the rows that it had. `pack_rows` may only change together with `data.packing`; another
`deal_work` leaves a step its rows, and its loss up to rounding.
"""

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_vlm.data.plan.order import Plan, draw_raw
from megatron_vlm.parallel.layout import causal_pairs

POOL_ROWS = 1024  # rows' worth of tokens that are packed together


class PackedPlan:
    """Rows of several samples, in an order that gives micro-batches and data-parallel ranks even work.

    Args:
        tokens: [n] length of every sample.
        seed, global_batch_size, shuffle: as `Plan`; without `shuffle` samples keep the file's order as far as packing
            allows (`packing.POOL_ROWS`).
        row_length: tokens of every row; no sample is longer.
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
        order = np.argsort(draw_raw((seed, 0, 2), len(tokens)), kind="stable") if shuffle else np.arange(len(tokens))
        rows = pack_rows(tokens, order, row_length)
        self.row_length, self.micro_batch_size = row_length, micro_batch_size
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
        return 1 - self.num_tokens / (self.num_rows * self.row_length)

    def __str__(self) -> str:
        steps = self.num_rows / self._rows.global_batch_size
        return (
            f"{len(self._samples):,} samples in {self.num_rows:,} rows of {self.row_length:,} tokens, "
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


def pack_rows(tokens: np.ndarray, order: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Fills rows of `capacity` tokens, pool after pool of an order.

    Args:
        tokens: [n] lengths of all samples, each of 1 to `capacity` tokens.
        order: [n] sample numbers; a pool is a piece of it.
        capacity: tokens of a row.

    Returns:
        Rows of sample numbers; every sample is in one. Rows follow the order's pools, and in a pool their samples
        that are earliest in the order.
    """
    before = np.cumsum(tokens[order], dtype=np.int64) - tokens[order]
    pools = np.split(order, np.flatnonzero(np.diff(before // (POOL_ROWS * capacity))) + 1)
    rows: list[tuple[int, ...]] = []
    for pool in pools:
        lengths = tokens[pool].tolist()
        filled = sorted(first_fit_decreasing(lengths, capacity), key=min)
        rows += [tuple(pool[arrange(row)].tolist()) for row in filled]
    return rows


def arrange(row: list[int]) -> list[int]:
    """Items of a row, longest first -> the second, the others from the shortest on, the first."""
    return [*row[1:2], *row[:1:-1], *row[:1]]


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each item into the first row that has room for it (Johnson, 1973): at most 11/9 of the fewest rows
    possible, and one. Of equal lengths the earlier item comes first. Returns the rows' items, as they came in."""
    num_rows = 2 * sum(lengths) // capacity + 1  # enough: any two rows together hold more than one's worth
    room = np.full(num_rows, capacity, np.int32)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        row = int((room >= lengths[item]).argmax())
        assert 0 < lengths[item] <= room[row], f"a sample of {lengths[item]} tokens in rows of {capacity}"
        room[row] -= lengths[item]
        rows[row].append(item)
    return [row for row in rows if row]


def attention_work(tokens: np.ndarray, windows: Sequence[int | None] = (None,)) -> np.ndarray:
    """Pairs of query and key of samples [n] over all layers; a row's work is their sum, since nothing is computed for
    its padding.

    Args:
        tokens: [n] their lengths.
        windows: by layer (`models.architectures.attention_windows`).
    """
    lengths, places = np.unique(tokens, return_inverse=True)
    layers = Counter(windows)
    pairs = [sum(layers[window] * causal_pairs(length, window) for window in layers) for length in lengths.tolist()]
    return np.array(pairs)[places]


def deal_work(work: Sequence[int], micro_batch_size: int) -> list[int]:
    """An order of rows in which micro-batches are of nearly equal work, and so are the ranks' shares for any number of
    ranks that divides that of the micro-batches (these are dealt to ranks in turn).

    Args:
        work: of each row; their number is a multiple of `micro_batch_size`.

    Returns:
        The rows' indices, `micro_batch_size` of each micro-batch after the other.
    """
    micro_batches = even_groups(work, len(work) // micro_batch_size)
    sums = [sum(work[row] for row in rows) for rows in micro_batches]
    return [row for number in _deal(sums) for row in micro_batches[number]]


def _deal(work: Sequence[int]) -> list[int]:
    """Items in the order of their places: the longest first, each to the free place whose ranks have least, over all
    numbers of ranks at once. (That is the step that adds least to the sum, over numbers of ranks, of the variance of
    the ranks' shares relative to their mean.)"""
    num_items = len(work)
    rank_counts = [count for count in range(2, num_items) if num_items % count == 0]
    loads = np.zeros(num_items)  # by place: what the ranks that it belongs to have, each relative to its rank's share
    dealt = [0] * num_items
    for item in sorted(range(num_items), key=lambda item: (-work[item], item)):
        place = int(loads.argmin())
        dealt[place] = item
        for count in rank_counts:
            loads[place % count :: count] += count * work[item]
        loads[place] = np.inf
    return dealt


def even_groups(work: Sequence[int], num_groups: int) -> list[list[int]]:
    """Items in groups of equal size and nearly equal work: longest first onto the least loaded group that is not
    full."""
    size = len(work) // num_groups
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [(0, number) for number in range(num_groups)]  # a heap of the groups that are not full
    for item in sorted(range(len(work)), key=lambda item: (-work[item], item)):
        load, number = heapq.heappop(loads)
        groups[number].append(item)
        if len(groups[number]) < size:
            heapq.heappush(loads, (load + work[item], number))
    return groups
