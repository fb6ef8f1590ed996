"""The media plan, carried out on plain lists: rows arrive where their tokens live, gradients come back once."""

import dataclasses
import itertools
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_vlm.parallel.layout import SequenceLayout, length_multiple
from megatron_vlm.parallel.media_plan import UNKNOWN, MediaCost, MediaItem, MediaPlan, Route, assign, plan_media
from megatron_vlm.parallel.sizes import Coordinates, GridSizes

degree = st.integers(1, 3)


@st.composite
def plans(draw: st.DrawFn) -> MediaPlan:
    """A window of up to six images in a layout with or without sequence parallelism, of one replica or of all."""
    over_world = draw(st.booleans())
    sizes = GridSizes(draw(degree), draw(degree), draw(degree), draw(degree), draw(st.integers(1, 2)))
    sp = sizes.tensor if draw(st.booleans()) else 1
    length = length_multiple(sizes.ring, sizes.ulysses, sp) * draw(st.integers(1, 4))
    items = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, length - 1))
        num_tokens = draw(st.integers(1, length - start))
        cost = draw(st.floats(0, 10))
        data = draw(st.integers(0, sizes.data - 1)) if over_world else 0
        items.append(MediaItem(cost, num_tokens, draw(st.integers(0, 2)), draw(st.integers(0, 1)), start, data))
    return plan_media(items, SequenceLayout(length, sizes.ring, sizes.ulysses, sp), sizes, over_world)


def place(plan: MediaPlan, media_rank: int) -> Coordinates:
    """Of a media rank; of a replica's, in replica 0."""
    return plan.sizes.coordinates(media_rank if plan.over_world else plan.sizes.replica_ranks(0)[media_rank])


def seen_by(plan: MediaPlan, media_rank: int) -> MediaPlan:
    """The plan that a rank makes itself: over the world it does not know where items stand that do not concern it."""
    concerned = {*plan.items_of(media_rank)}
    concerned |= {number for number, item in enumerate(plan.items) if item.data == place(plan, media_rank).data}
    items = [
        item if not plan.over_world or number in concerned else dataclasses.replace(item, start=UNKNOWN)
        for number, item in enumerate(plan.items)
    ]
    return plan_media(items, plan.layout, plan.sizes, plan.over_world)


def routes_of(plan: MediaPlan) -> list[Route]:
    return [seen_by(plan, rank).route(rank) for rank in range(plan.num_ranks)]


def exchange(outgoing: list[list], send_splits: list[list[int]], recv_splits: list[list[int]]) -> list[list]:
    """An all-to-all on lists, by rank; both sides' splits must agree."""
    blocks = []
    for rows, splits in zip(outgoing, send_splits, strict=True):
        rest = iter(rows)
        blocks.append([list(itertools.islice(rest, size)) for size in splits])
        assert not list(rest)
    for to, splits in enumerate(recv_splits):
        assert [len(block[to]) for block in blocks] == splits
    return [[row for block in blocks for row in block[to]] for to in range(len(outgoing))]


def encoded_rows(plan: MediaPlan, rank: int) -> list[tuple[int, int]]:
    """(item, token) of each encoded row of a rank."""
    return [(item, token) for item in plan.items_of(rank) for token in range(plan.items[item].num_tokens)]


def send(plan: MediaPlan, routes: list[Route]) -> list[list[tuple[int, int]]]:
    """What each rank receives, as (item, token)."""
    outgoing = [[encoded_rows(plan, rank)[i] for i in route.send_rows] for rank, route in enumerate(routes)]
    return exchange(outgoing, [r.send_splits for r in routes], [r.recv_splits for r in routes])


TEXT_ONLY = plan_media([], SequenceLayout(8, tensor=2), GridSizes(tensor=2))


@given(plans())
@example(TEXT_ONLY)
def test_every_row_arrives_where_its_token_lives(plan: MediaPlan) -> None:
    layout = plan.layout
    received = send(plan, routes_of(plan))
    for rank in range(plan.num_ranks):
        at = place(plan, rank)
        assert plan.media_rank(at) == rank
        route = plan.route(rank)
        wanted = set()
        if at.pipeline == 0:
            local = layout.positions(at.ring, at.ulysses, at.tensor if layout.tensor > 1 else 0).tolist()
            for number, item in enumerate(plan.items):
                if item.data != at.data:
                    continue
                span = range(item.start, item.start + item.num_tokens)
                wanted |= {
                    (number, position - item.start, item.micro_batch, item.row, index)
                    for index, position in enumerate(local)
                    if position in span
                }
        places = zip(route.micro_batch.tolist(), route.row.tolist(), route.position.tolist(), strict=True)
        found = [(*row, *place) for row, place in zip(received[rank], places, strict=True)]
        assert len(found) == len(set(found)) and set(found) == wanted


@given(plans())
def test_a_rank_routes_the_same_without_the_places_that_do_not_concern_it(plan: MediaPlan) -> None:
    for rank in range(plan.num_ranks):
        theirs = seen_by(plan, rank)
        assert theirs.encoder_of == plan.encoder_of
        assert_same_route(theirs.route(rank), plan.route(rank))


def test_a_place_that_is_needed_is_not_left_out_in_silence() -> None:
    items = [MediaItem(3, 2, 0, 0, 0, data=0), MediaItem(2, 2, 0, 0, UNKNOWN, data=1)]
    plan = plan_media(items, SequenceLayout(4), GridSizes(data=2), over_world=True)
    assert plan.encoder_of == (0, 1)
    assert plan.route(0).send_splits == [2, 0]
    with pytest.raises(AssertionError, match="rank 1 needs the place of"):
        plan.route(1)


@given(plans())
@example(TEXT_ONLY)
def test_every_gradient_comes_back_to_its_row_exactly_once(plan: MediaPlan) -> None:
    routes = routes_of(plan)
    received = send(plan, routes)
    outgoing = [[rows[i] for i in route.grad_send_rows] for rows, route in zip(received, routes, strict=True)]
    back = exchange(outgoing, [r.grad_send_splits for r in routes], [r.grad_recv_splits for r in routes])
    for rank, route in enumerate(routes):
        rows = encoded_rows(plan, rank)
        assert sorted(route.grad_rows.tolist()) == list(range(len(rows)))  # each once, none left out
        assert [rows[i] for i in route.grad_rows] == back[rank]


@given(plans())
def test_tensor_ranks_share_the_way_back(plan: MediaPlan) -> None:
    """With SP the way back is the transpose; without it each tensor rank returns a T-th (to a row per sender)."""
    copies = plan.sizes.tensor // plan.layout.tensor
    for route in routes_of(plan):
        if copies == 1:
            assert route.grad_send_rows.tolist() == list(range(len(route.position)))
            assert (route.grad_send_splits, route.grad_recv_splits) == (route.recv_splits, route.send_splits)
            assert torch.equal(route.grad_rows, route.send_rows)
        for got, returned in zip(route.recv_splits, route.grad_send_splits, strict=True):
            assert got // copies <= returned <= -(-got // copies)


@given(plans())
def test_a_plan_survives_the_way_from_a_worker(plan: MediaPlan) -> None:
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    for rank in range(plan.num_ranks):
        assert_same_route(plan.route(rank), again.route(rank))


def assert_same_route(ours: Route, theirs: Route) -> None:
    for field in dataclasses.fields(Route):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


@given(plans())
def test_everything_is_encoded_once(plan: MediaPlan) -> None:
    assert sorted(i for rank in range(plan.num_ranks) for i in plan.items_of(rank)) == list(range(len(plan.items)))
    for rank in range(plan.num_ranks):
        assert plan.num_rows(rank) == len(encoded_rows(plan, rank)) == len(plan.route(rank).grad_rows)


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 6))
def test_assignment_is_balanced(costs: list[int], num_ranks: int) -> None:
    """No rank's load exceeds the mean by a whole item: what greedy assignment guarantees, and round robin does not."""
    ranks = assign(costs, num_ranks)
    for cost in set(costs):  # frames of a video that one rank encodes are neighbours, and decoded in one go
        of_one_cost = [rank for c, rank in zip(costs, ranks, strict=True) if c == cost]
        assert of_one_cost == sorted(of_one_cost)
    loads = [sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(num_ranks)]
    assert max(loads) <= sum(costs) / num_ranks + max(costs, default=0) * (1 - 1 / num_ranks)


def test_assignment_examples() -> None:
    assert assign([1, 1, 1, 1], 2) == [0, 0, 1, 1]  # neighbours
    assert assign([1, 3, 1, 1, 1], 2) == [0, 0, 1, 1, 1]
    assert assign([1, 2, 5, 4], 2) == [0, 1, 0, 1]  # longest first: {5, 1} and {4, 2}
    assert assign([], 3) == []
    assert assign([0.0, 0.0], 2) == [0, 0]


def test_cost() -> None:
    assert MediaCost().of(10) == 10
    assert MediaCost(linear=2, quadratic=0.5).of(10) == 70


def test_an_item_outside_its_row_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError, match="leaves its row"):
        plan_media([MediaItem(1, 5, 0, 0, 4)], SequenceLayout(8), GridSizes())
    with pytest.raises(AssertionError, match="does not fit"):
        plan_media([], SequenceLayout(8, ring=2), GridSizes())
