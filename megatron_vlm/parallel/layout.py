"""Ownership of a sequence's tokens: the only answer in the package (DESIGN D5). Pure: no groups, no megatron.

A sequence of `length` tokens is cut into 2*ring equal chunks. Ring rank r has chunks r and 2*ring-1-r, concatenated, so
that causal attention costs every ring rank the same (zigzag). That slice is cut into `ulysses` contiguous pieces
(Ulysses fastest-varying), and under Megatron sequence parallelism each of those into `tensor` contiguous pieces:

    length=16, ring=2, ulysses=2, tensor=1        positions
    ring 0, ulysses 0 | 1                         0 1 2 3 | 12 13 14 15
    ring 1, ulysses 0 | 1                         4 5 6 7 |  8  9 10 11

The hazard is a second answer elsewhere: cutting ids, labels, positions or feature rows by any other rule leaks the
future into the past without an error.

Attention is computed in blocks: a query interval and a key interval inside one packed document. Documents are
intervals, so two disjoint chunks share at most one document, and exactly that rectangle is computed: nothing is padded
per document, and documents of any length, 1 too, stand anywhere. What a mask hides at a rectangle's rim is cut off, so
that empty blocks do not exist and the keys of a block are those that it reads. At step s of the ring, rank r computes
with the keys of rank r-s.

Letters: n positions asked for; L length; R ring; U ulysses; T tensor.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.errors import ParallelError


def length_multiple(ring: int = 1, ulysses: int = 1, tensor: int = 1) -> int:
    """The number that a sequence's length must be a multiple of."""
    return ring * math.lcm(2, ulysses * tensor) if ring > 1 else ulysses * tensor


def padded_length(num_tokens: int, ring: int = 1, ulysses: int = 1, tensor: int = 1) -> int:
    """The shortest possible length that holds `num_tokens`."""
    multiple = length_multiple(ring, ulysses, tensor)
    return -(-num_tokens // multiple) * multiple


def row_length(num_tokens: int, parallel: ParallelConfig) -> int:
    """Tokens of the rows in which the ranks of a recipe see `num_tokens`: rounded up to what they can cut. The rest is
    padding, in which nothing is trained. With training.sequence_length: the longest row there can be."""
    return padded_length(num_tokens, parallel.ring, parallel.ulysses, parallel.tensor if parallel.sequence else 1)


@dataclass(frozen=True)
class SequenceLayout:
    """One sequence over the ranks of a context-parallel group, and over the tensor ranks under sequence parallelism.

    Args:
        length: tokens of the whole sequence.
        ring: ring ranks.
        ulysses: Ulysses ranks.
        tensor: tensor ranks that share a slice: 1 where sequence parallelism is off.

    Raises:
        ParallelError: the length cannot be cut evenly.
    """

    length: int
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.length <= 0 or self.length % self.multiple:
            raise ParallelError(
                f"sequence length: found {self.length}, needed a positive multiple of {self.multiple} "
                f"(ring {self.ring}, ulysses {self.ulysses}, sequence-parallel ranks {self.tensor})"
            )

    @property
    def multiple(self) -> int:
        """The number that the sequence length must be a multiple of."""
        return length_multiple(self.ring, self.ulysses, self.tensor)

    @property
    def local_length(self) -> int:
        """Tokens of each rank."""
        return self.length // (self.ring * self.ulysses * self.tensor)

    def positions(self, ring_rank: int = 0, ulysses_rank: int = 0, tensor_rank: int = 0) -> Tensor:
        """Global positions of a rank's tokens, in the order in which it holds them: [local_length] int64."""
        chunks = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.chunks_of(ring_rank)])
        start = (ulysses_rank * self.tensor + tensor_rank) * self.local_length
        return chunks[start : start + self.local_length].clone()

    def chunks_of(self, ring_rank: int) -> "list[Interval]":
        """The intervals that a ring rank's Ulysses group owns, in its order: two of L/2R positions, or all L."""
        if self.ring == 1:
            return [Interval(0, self.length)]
        chunk = self.length // (2 * self.ring)
        return [Interval(i * chunk, (i + 1) * chunk) for i in (ring_rank, 2 * self.ring - 1 - ring_rank)]

    def local_interval(self, ring_rank: int, interval: "Interval") -> "Interval":
        """Indices into a ring rank's L/R positions of an interval that lies in one of its chunks."""
        start = interval.start
        if self.ring > 1:
            chunk = self.length // (2 * self.ring)
            start = start % chunk + (chunk if start // chunk != ring_rank else 0)
        return Interval(start, start + len(interval))

    def owners(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ring, ulysses, tensor) ranks that own global positions [n]: three [n] int64."""
        ring, within = self._ring_slice(positions)
        piece = within // self.local_length
        return ring, piece // self.tensor, piece % self.tensor

    def local_index(self, positions: Tensor) -> Tensor:
        """Index of each global position in its owner's slice: [n] -> [n] int64."""
        _, within = self._ring_slice(positions)
        return within % self.local_length

    def _ring_slice(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Ring rank of each position, and its index among that ring rank's L/R tokens: [n] -> two [n]."""
        if self.ring == 1:
            return torch.zeros_like(positions), positions
        chunk = self.length // (2 * self.ring)
        number = positions // chunk
        in_second = number >= self.ring
        ring = torch.where(in_second, 2 * self.ring - 1 - number, number)
        return ring, positions % chunk + in_second * chunk


@dataclass(frozen=True)
class Interval:
    """Global positions start <= p < stop; empty where stop <= start."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def overlap(self, other: "Interval") -> "Interval":
        """The positions in both."""
        return Interval(max(self.start, other.start), min(self.stop, other.stop))


@dataclass(frozen=True)
class Documents:
    """The documents packed into one row: contiguous, covering it. Padding at the end is a document of its own.

    Args:
        starts: first position of each, ascending from 0.
        length: of the row.
        padded: the last one is padding: nothing is computed for it, it sees and is seen by nothing, itself included.
    """

    starts: tuple[int, ...]
    length: int
    padded: bool = False

    def __post_init__(self) -> None:
        edges = (*self.starts, self.length)
        ascending = all(start < stop for start, stop in zip(edges, edges[1:], strict=False))
        assert edges[0] == 0 and ascending, f"documents at {self.starts} of a row {self.length}"

    @classmethod
    def whole(cls, length: int) -> "Documents":
        """A row that is one document."""
        return cls((0,), length)

    @classmethod
    def packed(cls, lengths: Sequence[int], length: int) -> "Documents":
        """Documents of the given lengths, one after the other; what they leave of the row is padding."""
        *starts, stop = accumulate(lengths, initial=0)
        assert stop <= length, f"{stop} tokens in a row of {length}"
        return cls((*starts, stop), length, padded=True) if stop < length else cls(tuple(starts), length)

    def numbers(self, positions: Tensor) -> Tensor:
        """Number of the document of each global position: [n] -> [n] int64."""
        return torch.searchsorted(torch.tensor(self.starts), positions, right=True) - 1

    def number(self, position: int) -> int:
        """Number of the document of one global position."""
        return bisect_right(self.starts, position) - 1

    def interval(self, number: int) -> Interval:
        """Global positions of a document."""
        stop = self.starts[number + 1] if number + 1 < len(self.starts) else self.length
        return Interval(self.starts[number], stop)

    def shared(self, one: Interval, other: Interval) -> range:
        """Numbers of the documents with positions in both intervals, neither of them empty; padding is left out."""
        first, last = self.number(max(one.start, other.start)), self.number(min(one.stop, other.stop) - 1)
        return range(first, min(last + 1, len(self.starts) - self.padded))


@dataclass(frozen=True)
class Block:
    """One attention call: queries and keys of one document; every query sees a key, every key is seen.

    The query at global position i sees the key at j iff (not causal or j <= i) and (window is None or i - j < window).
    """

    queries: Interval
    keys: Interval
    causal: bool
    window: int | None

    @property
    def offset(self) -> int:
        """Index of the key at the position of the block's first query; outside of the block where positions differ."""
        return self.queries.start - self.keys.start

    @property
    def hides_future(self) -> bool:
        """Whether causality hides a key from any query."""
        return self.causal and self.keys.stop - 1 > self.queries.start

    @property
    def hides_past(self) -> bool:
        """Whether the window hides a key from any query."""
        return self.window is not None and self.queries.stop - 1 - self.keys.start >= self.window

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key, so that no mask is needed."""
        return not self.hides_future and not self.hides_past

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        queries, keys = self.queries, self.keys
        pairs = len(queries) * len(keys)
        if self.hides_future:  # query i misses the keys above it: stop - 1 - i of them, where positive
            pairs -= _triangle(keys.stop - 1 - queries.start) - _triangle(keys.stop - 1 - queries.stop)
        if self.window is not None and self.hides_past:  # and those under its window: i - window + 1 - start
            first_hidden = self.window + keys.start
            pairs -= _triangle(queries.stop - first_hidden) - _triangle(queries.start - first_hidden)
        return pairs


def _triangle(n: int) -> int:
    """1 + 2 + ... + n; 0 where n is negative."""
    return n * (n + 1) // 2 if n > 0 else 0


def blocks(queries: Interval, keys: Interval, documents: Documents, causal: bool, window: int | None) -> list[Block]:
    """The blocks of a query and a key interval, by ascending position: every visible pair is in exactly one.

    Args:
        queries, keys: any intervals of the row. Where they are disjoint there is at most one block; where they are the
            same there is one square for every document piece. Padding has none.
        window: keys that a query sees at most, itself included, before and at its position; None: no limit.
    """
    assert window is None or window > 0, f"window {window}"
    found = []
    for number in documents.shared(queries, keys):
        document = documents.interval(number)
        (first_query, last_query), (first_key, last_key) = (_ends(document.overlap(x)) for x in (queries, keys))
        if causal:
            first_query, last_key = max(first_query, first_key), min(last_key, last_query)
        if window is not None:
            first_key, last_query = max(first_key, first_query - window + 1), min(last_query, last_key + window - 1)
        if first_query <= last_query and first_key <= last_key:
            seen = Interval(first_query, last_query + 1), Interval(first_key, last_key + 1)
            found.append(Block(*seen, causal, window))
    return found


def _ends(interval: Interval) -> tuple[int, int]:
    """First and last position."""
    return interval.start, interval.stop - 1


def ring_blocks(
    layout: SequenceLayout, ring_rank: int, step: int, documents: Documents, causal: bool, window: int | None
) -> list[Block]:
    """Work of a ring rank at a step, when it has the keys of ring rank (ring_rank - step) mod R."""
    owner = (ring_rank - step) % layout.ring
    return [
        block
        for queries in layout.chunks_of(ring_rank)
        for keys in layout.chunks_of(owner)
        for block in blocks(queries, keys, documents, causal, window)
    ]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Everything in any of the intervals: disjoint intervals, ascending, none touching the next."""
    joined: list[Interval] = []
    for interval in sorted(intervals, key=_ends):
        if joined and interval.start <= joined[-1].stop:
            joined[-1] = Interval(joined[-1].start, max(joined[-1].stop, interval.stop))
        else:
            joined.append(interval)
    return joined


def causal_pairs(num_tokens: int, window: int | None) -> int:
    """Pairs of query and key in a document: a query sees itself and what is before it, in the window."""
    width = num_tokens if window is None else min(num_tokens, window)
    return width * (width + 1) // 2 + (num_tokens - width) * width


def work(layout: SequenceLayout, documents: Documents, causal: bool, window: int | None) -> Tensor:
    """Visible query-key pairs per ring rank and step: [R, R] int64, summed over that ring rank's Ulysses ranks."""
    steps = range(layout.ring)
    return torch.tensor(
        [
            [sum(block.pairs for block in ring_blocks(layout, rank, step, documents, causal, window)) for step in steps]
            for rank in range(layout.ring)
        ]
    )
