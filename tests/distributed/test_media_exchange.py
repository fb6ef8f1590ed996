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
from megatron_vlm.parallel.media_plan import MediaItem, Route, plan_media
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.ranks import RankFailure, RankPool

HIDDEN, LENGTH, MICRO_BATCHES, ROWS = 3, 16, 2, 2
ITEMS = [  # costs send them to different ranks; some cross chunk borders; micro-batch 1 row 1 is text only
    MediaItem(cost=5, num_tokens=9, micro_batch=0, row=0, start=1),
    MediaItem(cost=1, num_tokens=2, micro_batch=0, row=1, start=14),
    MediaItem(cost=4, num_tokens=4, micro_batch=1, row=0, start=0),
    MediaItem(cost=4, num_tokens=7, micro_batch=1, row=0, start=5),
]


def feature(item: int) -> torch.Tensor:
    """[num_tokens, h] what any encoder makes of an item."""
    return torch.randn(ITEMS[item].num_tokens, HIDDEN, generator=torch.Generator().manual_seed(item))


def token_weights() -> torch.Tensor:
    """[micro-batch, row, position, h]"""
    return torch.randn(MICRO_BATCHES, ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(99))


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


def round_trip(sizes: GridSizes, sequence_parallel: bool, num_items: int, fault: str, dtype: torch.dtype) -> list[int]:
    """Encodes, sends, merges, weighs, returns; checks this rank's part. Returns the items that this rank encoded."""
    from megatron_vlm.parallel.groups import build_grid

    grid = build_grid(sizes)
    layout = SequenceLayout(LENGTH, sizes.ring, sizes.ulysses, sizes.tensor if sequence_parallel else 1)
    plan = plan_media(ITEMS[:num_items], layout, sizes)
    route = FAULTS[fault](plan.route(grid.replica_rank))
    mine = plan.items_of(grid.replica_rank)
    encoded = torch.cat([torch.empty(0, HIDDEN), *(feature(item) for item in mine)]).to(dtype).requires_grad_()

    leaves = media_exchange.send_features(encoded, route, grid.replica).requires_grad_()
    assert leaves.is_leaf and leaves.dtype == dtype
    at = grid.coordinates
    positions = layout.positions(at.ring, at.ulysses, at.tensor if sequence_parallel else 0)
    expected = torch.zeros(MICRO_BATCHES, ROWS, LENGTH, HIDDEN, dtype=dtype)
    for number, item in enumerate(ITEMS[:num_items]):
        expected[item.micro_batch, item.row, item.start : item.start + item.num_tokens] = feature(number).to(dtype)
    merged = torch.zeros(MICRO_BATCHES, ROWS, layout.local_length, HIDDEN, dtype=dtype)
    merged = merged.index_put((route.micro_batch, route.row, route.position), leaves)
    if at.pipeline == 0:
        torch.testing.assert_close(merged, expected[:, :, positions], rtol=0, atol=0)
    else:
        assert len(leaves) == 0

    (merged * token_weights()[:, :, positions].to(dtype)).sum().backward()
    grads = media_exchange.return_gradients(leaves.grad, route, len(encoded), grid.replica)
    wanted = [torch.empty(0, HIDDEN)]
    for item in (ITEMS[number] for number in mine):
        wanted.append(token_weights()[item.micro_batch, item.row, item.start : item.start + item.num_tokens])
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
    encoded = ranks.run(sizes.world, round_trip, sizes, sp, num_items, "none", torch.float32)
    everything = sorted(item for items in encoded for item in items)
    assert everything == sorted(sizes.data * list(range(num_items)))
    if num_items == len(ITEMS):
        assert all(encoded)  # every rank had work


def test_half_precision(ranks: RankPool) -> None:
    ranks.run(2, round_trip, GridSizes(tensor=2), False, len(ITEMS), "none", torch.bfloat16)


@pytest.mark.parametrize("fault", ["swapped rows", "wrong share"])
def test_wrong_routes_are_noticed(ranks: RankPool, fault: str) -> None:
    with pytest.raises(RankFailure, match="Tensor-likes are not equal"):
        ranks.run(2, round_trip, GridSizes(tensor=2), False, len(ITEMS), fault, torch.float32)


def test_one_process_sends_nothing() -> None:
    plan = plan_media(ITEMS, SequenceLayout(LENGTH), GridSizes())
    group = mock.Mock(size=lambda: 1)
    encoded = torch.cat([feature(item) for item in range(len(ITEMS))])
    received = media_exchange.send_features(encoded, plan.route(0), group)
    assert torch.equal(received, encoded) and received is not encoded
    assert torch.equal(media_exchange.return_gradients(2 * encoded, plan.route(0), len(encoded), group), 2 * encoded)
