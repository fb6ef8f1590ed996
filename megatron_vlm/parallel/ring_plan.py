"""Work of a ring rank at each step, and the keys it needs for that: pure (DESIGN D5, D6).

At step s ring rank r, the reader, computes with keys of ring rank r-s, the owner. The layout's blocks say what; here
they become attention calls on the tensors that ranks hold. Positions become indices, and since a ring rank holds its
two chunks one behind the other, blocks that are apart in the sequence may be neighbours in memory. A document over all
chunks then takes one call per step: a causal square at step 0, later all queries with the owner's first chunk, or the
queries of the reader's second chunk with all keys.

The reader gets exactly the keys that its calls read: nothing where no document or window reaches from one rank's chunks
to the other's. Reader and owner both compute this, so nothing is negotiated; the hazard is a rank that knows of other
documents than its peer: it would wait for keys that nobody sends.

Letters: L length, R ring, b rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from megatron_vlm.parallel.layout import Block, Documents, Interval, SequenceLayout, blocks, ring_blocks, union


@dataclass(frozen=True)
class Call:
    """One attention call: indices into the reader's L/R queries and into the keys at hand, and the mask's rest.

    Args:
        offset: which of the call's keys stands where its first query stands; of no account without a mask.
        causal, window: None and False where they hide nothing here.
    """

    queries: Interval
    keys: Interval
    offset: int
    causal: bool
    window: int | None

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return not self.causal and self.window is None


@dataclass(frozen=True)
class KeyRequest:
    """Work of a reader with an owner's keys, in neighbouring rows that have the same documents.

    Args:
        first_row, stop_row: rows first_row <= row < stop_row of the batch.
        keys: which of the owner's keys the reader needs: indices into the owner's slice, disjoint and ascending.
        calls: their keys are indices into those intervals, one behind the other.
    """

    first_row: int
    stop_row: int
    keys: tuple[Interval, ...]
    calls: tuple[Call, ...]

    @property
    def rows(self) -> slice:
        """The rows, as an index."""
        return slice(self.first_row, self.stop_row)

    @property
    def num_keys(self) -> int:
        """Keys needed of each row."""
        return sum(map(len, self.keys))


@dataclass(frozen=True)
class RingPlan:
    """The ring's work. Every layer asks the same, forward and backward, so results are kept here, and go
    with the plan's micro-batch.

    Args:
        layout: of every row.
        documents: of each row.
        causal, window: of the layer (`Block`).
    """

    layout: SequenceLayout
    documents: tuple[Documents, ...]
    causal: bool = True
    window: int | None = None
    _known: "dict[tuple[int, int | None], tuple[KeyRequest, ...]]" = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        lengths = {documents.length for documents in self.documents}
        assert lengths <= {self.layout.length}, f"rows of {sorted(lengths)} tokens in a layout of {self.layout.length}"

    def requests(self, reader: int, step: int) -> "tuple[KeyRequest, ...]":
        """Work of ring rank `reader` at a step, when it has keys of ring rank (reader - step) mod R.

        At step 0 the keys are all of its own; later exactly those needed, and rows that need none have no request.
        """
        if (reader, step) not in self._known:
            self._known[reader, step] = _requests(self, reader, step)
        return self._known[reader, step]

    def gathered_requests(self, reader: int) -> "tuple[KeyRequest, ...]":
        """Work of ring rank `reader` in one step with all keys, in global order."""
        if (reader, None) not in self._known:
            self._known[reader, None] = _gathered_requests(self, reader)
        return self._known[reader, None]

    def equal_rows(self) -> list[tuple[int, int, Documents]]:
        """(first row, stop row, documents) of each run of rows with the same documents."""
        runs, row = [], 0
        for documents, run in groupby(self.documents):
            first, row = row, row + len(list(run))
            runs.append((first, row, documents))
        return runs


def _requests(plan: RingPlan, reader: int, step: int) -> tuple[KeyRequest, ...]:
    layout, owner = plan.layout, (reader - step) % plan.layout.ring
    found = []
    for first_row, stop_row, documents in plan.equal_rows():
        computed = ring_blocks(layout, reader, step, documents, plan.causal, plan.window)
        calls = _joined(
            _call(block, layout.local_interval(reader, block.queries), layout.local_interval(owner, block.keys))
            for block in computed
        )
        if step == 0:
            found.append(KeyRequest(first_row, stop_row, (Interval(0, layout.length // layout.ring),), tuple(calls)))
        elif calls:
            keys = union(call.keys for call in calls)
            found.append(KeyRequest(first_row, stop_row, tuple(keys), tuple(_renumbered(calls, keys))))
    return tuple(found)


def _gathered_requests(plan: RingPlan, reader: int) -> tuple[KeyRequest, ...]:
    layout, everything = plan.layout, Interval(0, plan.layout.length)
    return tuple(
        KeyRequest(
            first_row,
            stop_row,
            (everything,),
            tuple(
                _call(block, layout.local_interval(reader, block.queries), block.keys)
                for queries in layout.chunks_of(reader)
                for block in blocks(queries, everything, documents, plan.causal, plan.window)
            ),
        )
        for first_row, stop_row, documents in plan.equal_rows()
    )


def _call(block: Block, queries: Interval, keys: Interval) -> Call:
    """A block whose queries and keys are found at these indices."""
    return Call(queries, keys, block.offset, block.hides_future, block.window if block.hides_past else None)


def _renumbered(calls: Iterable[Call], intervals: Sequence[Interval]) -> list[Call]:
    """The same calls on keys of which only these intervals are left, one behind the other."""
    found = []
    for call in calls:
        before = sum(len(interval) for interval in intervals if interval.stop <= call.keys.start)
        (home,) = (interval for interval in intervals if interval.start <= call.keys.start < interval.stop)
        start = before + call.keys.start - home.start
        found.append(replace(call, keys=Interval(start, start + len(call.keys))))
    return found


def _joined(calls: Iterable[Call]) -> list[Call]:
    """Fewer calls for the same pairs: neighbours of equal queries first, then neighbours of equal keys."""
    wide = _joined_neighbours(sorted(calls, key=lambda call: (call.queries.start, call.keys.start)), _beside)
    return _joined_neighbours(sorted(wide, key=lambda call: (call.keys.start, call.queries.start)), _below)


def _joined_neighbours(calls: Iterable[Call], join: Callable[[Call, Call], Call | None]) -> list[Call]:
    """Each call joined with the ones before it where `join` allows."""
    joined: list[Call] = []
    for call in calls:
        both = join(joined[-1], call) if joined else None
        if both is None:
            joined.append(call)
        else:
            joined[-1] = both
    return joined


def _beside(left: Call, right: Call) -> Call | None:
    """Keys of `right` follow those of `left`, of which the same queries see all."""
    adjacent = left.queries == right.queries and left.keys.stop == right.keys.start
    if not adjacent or not left.is_full or right.window is not None:
        return None
    keys = Interval(left.keys.start, right.keys.stop)
    return replace(right, keys=keys, offset=right.offset + len(left.keys))


def _below(upper: Call, lower: Call) -> Call | None:
    """Queries of `lower` follow those of `upper`: both see all of the same keys, or one diagonal bounds both."""
    if upper.queries.stop != lower.queries.start or upper.keys.start != lower.keys.start:
        return None
    both_full = upper.is_full and lower.is_full and upper.keys == lower.keys
    one_diagonal = upper.causal and lower.causal and lower.offset == upper.offset + len(upper.queries)
    bounds_both = lower.offset <= len(upper.keys) <= len(lower.keys)  # the diagonal, not the keys' end
    windowed = upper.window is not None or lower.window is not None
    if not both_full and (windowed or not one_diagonal or not bounds_both):
        return None
    queries = Interval(upper.queries.start, lower.queries.stop)
    return replace(lower, queries=queries, offset=upper.offset)
