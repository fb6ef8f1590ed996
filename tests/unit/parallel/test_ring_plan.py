"""The ring's calls against the visible matrix: what they compute, with which keys, in how many calls."""

import dataclasses
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vlm.parallel import ring_plan
from megatron_vlm.parallel.layout import Documents, Interval, SequenceLayout, ring_blocks, union
from megatron_vlm.parallel.ring_plan import Call, KeyRequest, RingPlan
from tests.helpers.data.packed import random_documents, visible


@st.composite
def plans(draw: st.DrawFn) -> RingPlan:
    ring = draw(st.integers(1, 5))
    length = 2 * ring * draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(1, min(length, 6)) | st.just(length))
        documents = random_documents(length, number, draw(st.integers(0, 99)))
        rows += [dataclasses.replace(documents, padded=draw(st.booleans()))] * draw(st.integers(1, 2))
    window = draw(st.none() | st.integers(1, length))
    return RingPlan(SequenceLayout(length, ring), tuple(rows), draw(st.booleans()), window)


def pairs_of(call: Call) -> Tensor:
    """[queries, keys] bool: what `ops.attention` lets this call's queries see."""
    place = torch.arange(len(call.queries))[:, None] + call.offset
    key = torch.arange(len(call.keys))
    seen = torch.ones(len(call.queries), len(call.keys), dtype=torch.bool)
    if call.causal:
        seen &= key <= place
    if call.window is not None:
        seen &= place - key < call.window
    return seen


def count(plan: RingPlan, reader: int, requests: tuple[KeyRequest, ...], keys: Tensor, found: Tensor) -> None:
    """Adds the pairs of a step to found [b, L, L]; keys: global positions of the owner's."""
    queries = plan.layout.positions(reader)
    for request in requests:
        held = torch.cat([keys[interval.start : interval.stop] for interval in request.keys])
        assert len(held) == request.num_keys
        for call in request.calls:
            at = queries[call.queries.start : call.queries.stop, None], held[call.keys.start : call.keys.stop]
            assert len(at[0]) == len(call.queries) and len(at[1]) == len(call.keys)
            for row in range(request.first_row, request.stop_row):
                found[row][at] += pairs_of(call)


def check(plan: RingPlan) -> None:
    """Every visible pair is computed once, and nothing else, in both modes."""
    wanted = torch.stack([visible(documents, plan.causal, plan.window) for documents in plan.documents]).int()
    travelling, gathered = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for reader in range(plan.layout.ring):
        for step in range(plan.layout.ring):
            keys = plan.layout.positions((reader - step) % plan.layout.ring)
            count(plan, reader, plan.requests(reader, step), keys, travelling)
        count(plan, reader, plan.gathered_requests(reader), torch.arange(plan.layout.length), gathered)
    assert torch.equal(travelling, wanted), "travelling keys"
    assert torch.equal(gathered, wanted), "gathered keys"


@given(plans())
def test_calls_are_the_visible_matrix(plan: RingPlan) -> None:
    check(plan)


@given(plans())
def test_a_reader_gets_the_keys_it_reads(plan: RingPlan) -> None:
    for reader in range(plan.layout.ring):
        for step in range(1, plan.layout.ring):
            owner = plan.layout.positions((reader - step) % plan.layout.ring)
            for request in plan.requests(reader, step):
                got = torch.cat([owner[interval.start : interval.stop] for interval in request.keys])
                documents = plan.documents[request.first_row]
                computed = ring_blocks(plan.layout, reader, step, documents, plan.causal, plan.window)
                read = union(block.keys for block in computed)
                assert sorted(got.tolist()) == [p for keys in read for p in range(keys.start, keys.stop)]


def test_one_document_takes_one_call_per_step() -> None:
    layout = SequenceLayout(64, ring=4)
    plan = RingPlan(layout, (Documents.whole(64),) * 3)
    full = Interval(0, 16)
    for reader in range(4):
        (request,) = plan.requests(reader, 0)
        assert request.rows == slice(0, 3) and request.calls == (Call(full, full, 0, True, None),)
        for step in range(1, 4):
            ((call,),) = (request.calls for request in plan.requests(reader, step))
            earlier = reader >= step  # the owner's first chunk for all queries, or all its keys for the second chunk
            assert (call.queries, call.keys) == ((full, Interval(0, 8)) if earlier else (Interval(8, 16), full))
            assert call.is_full
    both_ways = dataclasses.replace(plan, causal=False)
    for reader in range(4):
        for step in range(4):
            ((call,),) = (request.calls for request in both_ways.requests(reader, step))
            assert (call.queries, call.keys) == (full, full) and call.is_full


def test_documents_within_a_chunk_need_no_keys_of_others() -> None:
    plan = RingPlan(SequenceLayout(64, ring=4), (Documents(tuple(range(0, 64, 4)), 64),))
    assert all(plan.requests(reader, step) == () for reader in range(4) for step in range(1, 4))


def test_a_window_reaches_into_the_neighbouring_chunk_only() -> None:
    plan = RingPlan(SequenceLayout(64, ring=4), (Documents.whole(64),), window=3)
    needed = {(r, s): plan.requests(r, s) for r in range(4) for s in range(1, 4)}
    with_keys = {place: sum(request.num_keys for request in requests) for place, requests in needed.items() if requests}
    # chunk c reads two keys of chunk c - 1: ranks 1 2 3 those of the rank before, and ranks 0 1 2 of the one after
    assert with_keys == {(1, 1): 2, (2, 1): 2, (3, 1): 2, (0, 3): 2, (1, 3): 2, (2, 3): 2}


def test_a_plan_keeps_what_it_worked_out_and_nothing_else_does() -> None:
    """Every layer asks for the same; with the micro-batch it is gone."""
    plan = RingPlan(SequenceLayout(64, ring=4), (Documents.whole(64),))
    requests = [*plan.requests(1, 0), *plan.requests(1, 1), *plan.gathered_requests(1)]
    again = [*plan.requests(1, 0), *plan.requests(1, 1), *plan.gathered_requests(1)]
    assert len(requests) == 3 and all(one is other for one, other in zip(requests, again, strict=True))
    watched = [weakref.ref(request) for request in requests]
    del plan, requests, again
    assert not any(ref() for ref in watched)


def test_rows_are_as_long_as_the_layout() -> None:
    with pytest.raises(AssertionError, match=r"rows of \[60, 64\] tokens in a layout of 64"):
        RingPlan(SequenceLayout(64, ring=4), (Documents.whole(64), Documents.whole(60)))


def always_joined(upper: Call, lower: Call) -> Call:
    """A fault: calls are joined that are not neighbours."""
    return dataclasses.replace(lower, queries=Interval(upper.queries.start, lower.queries.stop), offset=upper.offset)


@pytest.mark.parametrize("name", ["_beside", "_below"])
def test_wrong_joins_are_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plan = RingPlan(SequenceLayout(32, ring=2), (Documents((0, 5, 20), 32),))
    monkeypatch.setattr(ring_plan, name, always_joined)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check(plan)
