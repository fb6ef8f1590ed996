"""Features to their owners and gradients back over real groups, against one process that does neither.

The function under test is y = sum over tokens of weight[token] . feature[token]: the gradient of every encoded row is
its token's weight, wherever the row was encoded and its token lives.
"""

import dataclasses
from unittest import mock

import pytest
import torch

from megatron_vlm.parallel import media_exchange
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_plan import UNKNOWN, MediaItem, MediaPlan, Route, plan_media
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.ranks.pool import RankFailure, RankPool

HIDDEN, LENGTH, MICRO_BATCHES, ROWS = 3, 16, 2, 2
ITEMS = [  # costs send them to different ranks; some cross chunk borders; micro-batch 1 row 1 is text only
    MediaItem(cost=5, num_tokens=9, micro_batch=0, row=0, start=1),
    MediaItem(cost=1, num_tokens=2, micro_batch=0, row=1, start=14),
    MediaItem(cost=4, num_tokens=4, micro_batch=1, row=0, start=0),
    MediaItem(cost=4, num_tokens=7, micro_batch=1, row=0, start=5),
]


def feature(number: int, item: MediaItem) -> torch.Tensor:
    """[num_tokens, h] what any encoder makes of an item."""
    return torch.randn(item.num_tokens, HIDDEN, generator=torch.Generator().manual_seed(number))


def token_weights(data: int) -> torch.Tensor:
    """[micro-batch, row, position, h] of a replica."""
    return torch.randn(MICRO_BATCHES, ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(99 + data))


def items_of_all(num_items: int, num_replicas: int) -> list[MediaItem]:
    """The same places in every replica; costs differ, so that replicas work for each other."""
    return [
        dataclasses.replace(item, data=data, cost=item.cost * (1 + data))
        for data in range(num_replicas)
        for item in ITEMS[:num_items]
    ]


def without_foreign_places(plan: MediaPlan, rank: int) -> MediaPlan:
    """As the rank makes it itself."""
    data = plan.sizes.coordinates(rank).data
    items = [
        item if item.data == data or encoder == rank else dataclasses.replace(item, start=UNKNOWN)
        for item, encoder in zip(plan.items, plan.encoder_of, strict=True)
    ]
    return plan_media(items, plan.layout, plan.sizes, over_world=True)


def swap_two_rows(route: Route) -> Route:
    """A wrong route: the first two rows received change places."""
    position = route.position.clone()
    position[:2] = position[:2].flip(0)
    return dataclasses.replace(route, position=position)


def return_first_rows(route: Route) -> Route:
    """A wrong route without SP: this rank returns the first rows it has, whichever share is its own."""
    count = len(route.grad_send_rows)
    return dataclasses.replace(route, grad_send_rows=torch.arange(count))


FAULTS = {"none": lambda route: route, "swapped rows": swap_two_rows, "wrong share": return_first_rows}


def round_trip(
    sizes: GridSizes,
    sequence_parallel: bool,
    num_items: int,
    fault: str = "none",
    dtype: torch.dtype = torch.float32,
    over_world: bool = False,
) -> list[int]:
    """Encodes, sends, merges, weighs, returns; checks this rank's part. Returns the items that this rank encoded."""
    from megatron_vlm.parallel.groups import build_grid

    grid = build_grid(sizes)
    layout = SequenceLayout(LENGTH, sizes.ring, sizes.ulysses, sizes.tensor if sequence_parallel else 1)
    items = items_of_all(num_items, sizes.data if over_world else 1)
    plan = plan_media(items, layout, sizes, over_world)
    group, rank = media_exchange.media_group(grid, over_world), plan.media_rank(grid.coordinates)
    route = FAULTS[fault]((without_foreign_places(plan, rank) if over_world else plan).route(rank))
    mine = plan.items_of(rank)
    encoded = torch.cat([torch.empty(0, HIDDEN), *(feature(number, items[number]) for number in mine)])
    encoded = encoded.to(dtype).requires_grad_()

    leaves = media_exchange.send_features(encoded, route, group).requires_grad_()
    assert leaves.is_leaf and leaves.dtype == dtype
    at = grid.coordinates
    positions = layout.positions(at.ring, at.ulysses, at.tensor if sequence_parallel else 0)
    expected = torch.zeros(MICRO_BATCHES, ROWS, LENGTH, HIDDEN, dtype=dtype)
    for number, item in enumerate(items):
        if item.data == (at.data if over_world else 0):
            rows = feature(number, item).to(dtype)
            expected[item.micro_batch, item.row, item.start : item.start + item.num_tokens] = rows
    merged = torch.zeros(MICRO_BATCHES, ROWS, layout.local_length, HIDDEN, dtype=dtype)
    merged = merged.index_put((route.micro_batch, route.row, route.position), leaves)
    if at.pipeline == 0:
        torch.testing.assert_close(merged, expected[:, :, positions], rtol=0, atol=0)
    else:
        assert len(leaves) == 0

    weights = token_weights(at.data if over_world else 0)
    (merged * weights[:, :, positions].to(dtype)).sum().backward()
    grads = media_exchange.return_gradients(leaves.grad, route, len(encoded), group)
    wanted = [torch.empty(0, HIDDEN)]
    for item in (items[number] for number in mine):
        weights = token_weights(item.data)
        wanted.append(weights[item.micro_batch, item.row, item.start : item.start + item.num_tokens])
    torch.testing.assert_close(grads, torch.cat(wanted).to(dtype), rtol=0, atol=0)
    return mine


LAYOUTS = {
    "tp2": (GridSizes(tensor=2), False),
    "tp2 + sp": (GridSizes(tensor=2), True),
    "pp2": (GridSizes(pipeline=2), False),
    "tp2 x pp2": (GridSizes(tensor=2, pipeline=2), False),
    "tp2 x pp2 + sp": (GridSizes(tensor=2, pipeline=2), True),
    "dp2 x tp2": (GridSizes(tensor=2, data=2), False),
    "ring 2": (GridSizes(ring=2), False),
    "ring 2 x ulysses 2": (GridSizes(ring=2, ulysses=2), False),
    "ring 2 x tp2 + sp": (GridSizes(ring=2, tensor=2), True),
    "ulysses 2 x tp2": (GridSizes(ulysses=2, tensor=2), False),
}


@pytest.mark.parametrize("num_items", [len(ITEMS), 1, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_arrive_and_gradients_return(ranks: RankPool, layout: str, num_items: int) -> None:
    sizes, sp = LAYOUTS[layout]
    encoded = ranks.run(sizes.world, round_trip, sizes, sp, num_items)
    everything = sorted(item for items in encoded for item in items)
    assert everything == sorted(sizes.data * list(range(num_items)))
    if num_items == len(ITEMS):
        assert all(encoded)  # every rank had work


WORLD_LAYOUTS = {
    "dp2": (GridSizes(data=2), False),
    "dp2 x tp2": (GridSizes(tensor=2, data=2), False),
    "dp2 x tp2 + sp": (GridSizes(tensor=2, data=2), True),
    "dp2 x pp2": (GridSizes(data=2, pipeline=2), False),
    "dp3": (GridSizes(data=3), False),
    "dp2 x ring 2": (GridSizes(ring=2, data=2), False),
    "dp2 x ring 2 x tp2 + sp": (GridSizes(ring=2, tensor=2, data=2), True),
    "dp2 x ulysses 2 x pp2": (GridSizes(ulysses=2, data=2, pipeline=2), False),
}


@pytest.mark.parametrize("num_items", [len(ITEMS), 0])
@pytest.mark.parametrize("layout", WORLD_LAYOUTS)
def test_replicas_work_for_each_other(ranks: RankPool, layout: str, num_items: int) -> None:
    sizes, sp = WORLD_LAYOUTS[layout]
    encoded = ranks.run(sizes.world, round_trip, sizes, sp, num_items, "none", torch.float32, True)
    assert sorted(item for items in encoded for item in items) == list(range(sizes.data * num_items))
    foreign = [
        item // num_items != sizes.coordinates(rank).data for rank, items in enumerate(encoded) for item in items
    ]
    assert any(foreign) == (num_items > 0)


def test_half_precision(ranks: RankPool) -> None:
    ranks.run(2, round_trip, GridSizes(tensor=2), False, len(ITEMS), "none", torch.bfloat16)


@pytest.mark.parametrize("fault", ["swapped rows", "wrong share"])
def test_wrong_routes_are_noticed(ranks: RankPool, fault: str) -> None:
    with pytest.raises(RankFailure, match="Tensor-likes are not equal"):
        ranks.run(2, round_trip, GridSizes(tensor=2), False, len(ITEMS), fault, torch.float32)


def test_one_process_sends_nothing() -> None:
    plan = plan_media(ITEMS, SequenceLayout(LENGTH), GridSizes())
    group = mock.Mock(size=lambda: 1)
    encoded = torch.cat([feature(number, item) for number, item in enumerate(ITEMS)])
    received = media_exchange.send_features(encoded, plan.route(0), group)
    assert torch.equal(received, encoded) and received is not encoded
    assert torch.equal(media_exchange.return_gradients(2 * encoded, plan.route(0), len(encoded), group), 2 * encoded)
