"""Blocks, documents and work of the layout against masks computed position by position."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vlm.parallel import layout as layout_module
from megatron_vlm.parallel.layout import (
    Block,
    Documents,
    Interval,
    SequenceLayout,
    blocks,
    length_multiple,
    padded_length,
    ring_blocks,
    union,
    work,
)
from tests.helpers.data.packed import random_documents, visible

LONGEST = 2048  # of a mask that is compared position by position
LONGEST_ROW = 10**6

windows = st.none() | st.integers(1, 300) | st.integers(1, 5)
degree = st.integers(1, 8)


@st.composite
def documents_of(draw: st.DrawFn, length: int) -> Documents:
    """From one document to as many as tokens, mostly with short ones among long ones."""
    number = draw(st.integers(0, min(length - 1, 40)) | st.just(length - 1))
    documents = random_documents(length, number + 1, draw(st.integers(0, 2**32)))
    return replace(documents, padded=draw(st.booleans()))


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[SequenceLayout, Documents]:
    ring, ulysses, tensor = draw(degree), draw(degree), draw(st.integers(1, 4))
    multiple = length_multiple(ring, ulysses, tensor)
    length = multiple * draw(st.integers(1, max(1, LONGEST // 4 // multiple)) | st.integers(1, LONGEST // multiple))
    return SequenceLayout(length, ring, ulysses, tensor), draw(documents_of(length))


def count_of(found: list[Block], length: int) -> Tensor:
    """[L, L] int: how often each pair is computed."""
    count = torch.zeros(length, length, dtype=torch.int8)
    for block in found:
        query = torch.arange(block.queries.start, block.queries.stop)[:, None]
        key = torch.arange(block.keys.start, block.keys.stop)
        seen = torch.ones(len(block.queries), len(block.keys), dtype=torch.bool)
        if block.hides_future:
            seen &= key <= query
        if block.hides_past:
            seen &= query - key < block.window
        assert int(seen.sum()) == block.pairs and bool(seen.all()) == block.is_full
        assert seen.any(0).all() and seen.any(1).all(), f"{block}: a query or a key is there for nothing"
        count[block.queries.start : block.queries.stop, block.keys.start : block.keys.stop] += seen
    return count


def check_blocks(layout: SequenceLayout, documents: Documents, causal: bool, window: int | None) -> None:
    """All ranks and steps together compute every visible pair once and no other, and `work` counts them."""
    steps = range(layout.ring)
    found = [[ring_blocks(layout, r, s, documents, causal, window) for s in steps] for r in range(layout.ring)]
    computed = count_of([block for rank in found for step in rank for block in step], layout.length)
    assert torch.equal(computed, visible(documents, causal, window).to(torch.int8))
    pairs = [[sum(block.pairs for block in step) for step in rank] for rank in found]
    assert work(layout, documents, causal, window).tolist() == pairs


@settings(max_examples=50)
@given(packed_rows(), st.booleans(), windows)
def test_blocks_are_the_visible_matrix(row: tuple[SequenceLayout, Documents], causal: bool, window: int | None) -> None:
    check_blocks(*row, causal, window)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_at_the_full_length(causal: bool) -> None:
    layout = SequenceLayout(LONGEST, ring=8, ulysses=8, tensor=4)
    for documents in (Documents.whole(LONGEST), Documents(tuple(range(LONGEST)), LONGEST)):
        check_blocks(layout, documents, causal, None)
    check_blocks(layout, Documents.packed([1, 700, 1, 1, 900], LONGEST), causal, 333)


def wrong_rim(queries: Interval, keys: Interval, documents: Documents, causal: bool, window: int | None) -> list[Block]:
    """A fault: the window is one key too wide."""
    return blocks(queries, keys, documents, causal, window and window + 1)


def wrong_documents(
    queries: Interval, keys: Interval, documents: Documents, causal: bool, window: int | None
) -> list[Block]:
    """A fault: the first of two documents is not told from the second."""
    starts = documents.starts[:1] + documents.starts[2:]
    return blocks(queries, keys, Documents(starts, documents.length), causal, window)


def wrong_future(
    queries: Interval, keys: Interval, documents: Documents, causal: bool, window: int | None
) -> list[Block]:
    """A fault: keys of later chunks are seen."""
    return blocks(queries, keys, documents, causal and queries.start >= keys.start, window)


@pytest.mark.parametrize("fault", [wrong_rim, wrong_documents, wrong_future])
def test_wrong_blocks_are_noticed(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., list[Block]]) -> None:
    monkeypatch.setattr(layout_module, "blocks", fault)
    with pytest.raises(AssertionError):
        check_blocks(SequenceLayout(48, ring=3), Documents((0, 5, 30), 48), True, 7)


@given(packed_rows(), st.booleans(), windows, st.data())
def test_chunks_apart_share_one_block_at_most(
    row: tuple[SequenceLayout, Documents], causal: bool, window: int | None, data: st.DataObject
) -> None:
    layout, documents = row
    chunks = st.sampled_from([chunk for rank in range(layout.ring) for chunk in layout.chunks_of(rank)])
    queries, keys = data.draw(chunks), data.draw(chunks)
    if queries != keys:
        found = blocks(queries, keys, documents, causal, window)
        assert len(found) <= 1 and not (found and causal and keys.start > queries.start)
    found = blocks(queries, queries, documents, causal, window)
    numbers = documents.numbers(torch.arange(queries.start, queries.stop))
    read = numbers[numbers < len(documents.starts) - documents.padded]
    assert len(found) == len(read.unique())
    assert sum(len(block.queries) for block in found) == len(read)


def test_padding_is_no_work() -> None:
    """As `data.packing.attention_work` counts it, and wherever the padding stands."""
    for lengths in ([1762, 572], [4095], [4096], [1] * 1000):
        pairs = work(SequenceLayout(4096, ring=4), Documents.packed(lengths, 4096), causal=True, window=None)
        assert pairs.sum() == sum(length * (length + 1) // 2 for length in lengths)


@given(st.integers(1, LONGEST_ROW), degree, degree, st.integers(1, 4), st.none() | st.integers(1, LONGEST_ROW))
def test_full_length_work_is_balanced(
    num_tokens: int, ring: int, ulysses: int, tensor: int, window: int | None
) -> None:
    """One document over the padded row: every ring rank's work is the mean, and at the later steps every step's too."""
    length = padded_length(num_tokens, ring, ulysses, tensor)
    layout, whole = SequenceLayout(length, ring, ulysses, tensor), Documents.whole(length)
    pairs = work(layout, whole, causal=True, window=None)
    assert pairs.sum() == length * (length + 1) // 2
    assert (pairs.sum(1) - pairs.sum(1).double().mean()).abs().max() <= 0.01 * pairs.sum(1).double().mean()
    assert (pairs[:, 1:] == 2 * (length // (2 * ring)) ** 2).all()
    assert work(layout, whole, causal=False, window=None).eq((length // ring) ** 2).all()
    if window is not None:  # query i sees min(i + 1, window) keys
        short = min(window, length)
        seen = short * (short + 1) // 2 + (length - short) * short
        assert work(layout, whole, causal=True, window=window).sum() == seen


@settings(max_examples=50)
@given(st.integers(1, LONGEST_ROW), degree, degree, st.integers(1, 4))
def test_long_rows_are_partitioned(num_tokens: int, ring: int, ulysses: int, tensor: int) -> None:
    """Every token once, and put back in order by the inverse."""
    layout = SequenceLayout(padded_length(num_tokens, ring, ulysses, tensor), ring, ulysses, tensor)
    everything = torch.arange(layout.length)
    owners = torch.stack(layout.owners(everything), 1)
    number = (owners * torch.tensor([ulysses * tensor, tensor, 1])).sum(1)
    place = number * layout.local_length + layout.local_index(everything)  # in all ranks' positions, one by one
    ranks = [(r, u, t) for r in range(ring) for u in range(ulysses) for t in range(tensor)]
    assert torch.equal(torch.cat([layout.positions(*rank) for rank in ranks])[place], everything)


@given(packed_rows(), st.data())
def test_intervals_of_chunks_are_found_in_the_ring_rank(
    row: tuple[SequenceLayout, Documents], data: st.DataObject
) -> None:
    layout, _ = row
    rank = data.draw(st.integers(0, layout.ring - 1))
    whole = SequenceLayout(layout.length, layout.ring).positions(rank)
    for chunk in layout.chunks_of(rank):
        start = data.draw(st.integers(chunk.start, chunk.stop - 1))
        stop = data.draw(st.integers(start + 1, chunk.stop))
        local = layout.local_interval(rank, Interval(start, stop))
        assert whole[local.start : local.stop].tolist() == list(range(start, stop))


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(0, 9))
def test_packed_documents_are_where_their_lengths_say(lengths: list[int], padding: int) -> None:
    length = sum(lengths) + padding
    if not length:
        return
    documents = Documents.packed(lengths, length)
    everything = [*lengths, padding] if padding else lengths
    assert [len(documents.interval(number)) for number in range(len(documents.starts))] == everything
    numbers = [number for number, size in enumerate(everything) for _ in range(size)]
    assert documents.numbers(torch.arange(length)).tolist() == numbers
    assert [documents.number(position) for position in range(length)] == numbers


@pytest.mark.parametrize("starts", [(), (1,), (0, 3, 3), (0, 5, 4), (0, 8)])
def test_documents_that_do_not_cover_a_row_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="of a row 8"):
        Documents(starts, 8)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=6))
def test_union_is_the_set_of_positions(parts: list[tuple[int, int]]) -> None:
    intervals = [Interval(start, start + size) for start, size in parts]
    joined = union(intervals)
    positions = sorted({p for interval in intervals for p in range(interval.start, interval.stop)})
    assert [p for interval in joined for p in range(interval.start, interval.stop)] == positions
    assert all(one.stop < other.start for one, other in zip(joined, joined[1:], strict=False))
