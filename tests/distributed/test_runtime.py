"""The rank pool, the grid of ranks and the collectives, on real gloo groups."""

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.errors import ParallelError
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from tests.helpers.ranks.pool import MAX_GROUPS, RankFailure, RankPool


def sum_of_ranks(offset: int) -> tuple[int, int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def test_ranks_share_a_group_of_the_size_asked_for(ranks: RankPool) -> None:
    assert ranks.run(2, sum_of_ranks, 10) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert ranks.run(1, sum_of_ranks, 0) == [(0, 1, 0.0)]
    assert ranks.run(3, sum_of_ranks, 0) == [(rank, 3, 3.0) for rank in range(3)]


def send_tensor_back(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + dist.get_rank()


def test_tensors_travel_by_value(ranks: RankPool) -> None:
    first, second = ranks.run(2, send_tensor_back, torch.zeros(3))
    torch.testing.assert_close(second - first, torch.ones(3))


def fail_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        raise KeyError("the planted error")
    dist.barrier()


def die_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        os._exit(7)


def hang_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        time.sleep(600)


kept_groups: list[dist.ProcessGroup] = []


def keep_groups(number: int) -> int:
    kept_groups.extend(dist.new_group() for _ in range(number))
    return len(kept_groups)


def test_ranks_with_many_groups_of_ended_tasks_are_replaced(ranks: RankPool) -> None:
    few, many = 2, MAX_GROUPS + 1
    assert ranks.run(2, keep_groups, few) == [few] * 2
    assert ranks.run(2, keep_groups, many) == [few + many] * 2
    assert ranks.run(2, keep_groups, 0) == [0] * 2


def test_every_failed_ranks_traceback_is_told_and_the_pool_recovers(tmp_path) -> None:
    pool = RankPool(tmp_path)
    try:
        with pytest.raises(RankFailure, match=r"rank 1: failed(.|\n)*fail_on(.|\n)*the planted error"):
            pool.run(2, fail_on, 1)
        with pytest.raises(RankFailure, match="rank 0: failed\ndied, exit code 7"):
            pool.run(2, die_on, 0)
        pool.run(2, sum_of_ranks, 0)  # up again, so that the time below is the task's alone
        with pytest.raises(RankFailure, match=r"hung: no answer in 6 s(.|\n)*rank 0: done(.|\n)*rank 1(.|\n)*hang_on"):
            pool.run(2, hang_on, 1, timeout=6)
        assert pool.run(2, sum_of_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(2, hang_on, 1)
        assert pool.run(2, sum_of_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]  # not what was interrupted
    finally:
        pool.stop()


def timeout_of(group: Any) -> timedelta:
    """Of its collectives."""
    return group._get_backend(torch.device("cpu")).options._timeout


def describe_grid(sizes: GridSizes, virtual_pipeline: int = 1) -> dict[str, object]:
    from megatron.core import parallel_state

    from megatron_vlm.parallel.groups import build_grid

    grid = build_grid(sizes, virtual_pipeline)
    assert {timeout_of(group) for group in vars(grid).values() if isinstance(group, dist.ProcessGroup)} == {
        timeout_of(dist.group.WORLD)
    }
    names = ("tensor", "context", "data", "data_context", "pipeline", "replica", "world", "solo")
    groups = {name: dist.get_process_group_ranks(getattr(grid, name)) for name in names}
    total = torch.ones(())
    dist.all_reduce(total, group=grid.replica)
    assert total == sizes.replica
    assert grid.replica.rank() == grid.replica_rank and grid.solo.size() == 1
    hierarchy = []
    if sizes.context > 1:
        hierarchy = [dist.get_process_group_ranks(g) for g in parallel_state.get_hierarchical_context_parallel_groups()]
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return {"coordinates": grid.coordinates, "groups": groups, "hierarchy": hierarchy, "virtual": virtual}


def members(sizes: GridSizes, rank: int, *free: str) -> list[int]:
    """Ranks whose coordinates differ from `rank`'s at most on the `free` axes: the definition of each group."""
    own = vars(sizes.coordinates(rank))
    others = {r: vars(sizes.coordinates(r)) for r in range(sizes.world)}
    return [r for r, at in others.items() if all(at[axis] == own[axis] for axis in own if axis not in free)]


GRIDS = [
    GridSizes(tensor=2, pipeline=2),
    GridSizes(tensor=2, data=2),
    GridSizes(ulysses=2, ring=2),
    GridSizes(data=2, pipeline=2),
]


@pytest.mark.parametrize("sizes", [*GRIDS, pytest.param(GridSizes(2, 2, 1, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_megatron_and_the_grid_arithmetic_agree(ranks: RankPool, sizes: GridSizes) -> None:
    for rank, seen in enumerate(ranks.run(sizes.world, describe_grid, sizes)):
        assert seen["coordinates"] == sizes.coordinates(rank)
        assert seen["groups"] == {
            "tensor": members(sizes, rank, "tensor"),
            "context": members(sizes, rank, "ulysses", "ring"),
            "data": members(sizes, rank, "data"),
            "data_context": members(sizes, rank, "data", "ulysses", "ring"),
            "pipeline": members(sizes, rank, "pipeline"),
            "replica": members(sizes, rank, "tensor", "ulysses", "ring", "pipeline"),
            "world": list(range(sizes.world)),
            "solo": [rank],
        }
        if sizes.context > 1:
            assert seen["hierarchy"] == [members(sizes, rank, "ulysses"), members(sizes, rank, "ring")]


def test_virtual_pipeline_reaches_megatron(ranks: RankPool) -> None:
    assert [seen["virtual"] for seen in ranks.run(2, describe_grid, GridSizes(pipeline=2), 2)] == [2, 2]
    assert [seen["virtual"] for seen in ranks.run(2, describe_grid, GridSizes(pipeline=2), 1)] == [None, None]


def refuse_grid() -> str:
    from megatron_vlm.parallel.groups import build_grid

    with pytest.raises(ParallelError) as caught:
        build_grid(GridSizes(tensor=3))
    return str(caught.value)


def test_a_grid_of_another_size_is_refused(ranks: RankPool) -> None:
    assert "found 2, needed 3" in ranks.run(2, refuse_grid)[0]


def run_vision_chunk() -> tuple[list[float], list[float]]:
    """(gradient of the sum over ranks of (rank+1) * w.x at x = (1, 10), w after the broadcast)"""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from megatron_vlm.parallel.groups import build_grid, vision_process_groups

    grid = build_grid(GridSizes(tensor=2, data=2))
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, calculate_per_token_loss=True)
    torch.manual_seed(grid.rank)
    module = torch.nn.Linear(2, 1, bias=False)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, module, pg_collection=vision_process_groups(grid))
    chunk.broadcast_params()
    chunk.zero_grad_buffer()
    (chunk(torch.tensor([[1.0, 10.0]])) * (grid.rank + 1)).sum().backward()
    chunk.finish_grad_sync()
    buffer = chunk.buffers[0]
    mine = buffer.buckets[0].grad_data.chunk(4)[grid.rank]
    parts = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(parts, mine.contiguous())
    start, end, _ = buffer.param_index_map[module.weight]
    return torch.cat(parts)[start:end].tolist(), module.weight.flatten().tolist()


def test_vision_gradients_are_summed_over_the_whole_world(ranks: RankPool) -> None:
    results = ranks.run(4, run_vision_chunk)
    for gradient, weight in results:
        assert gradient == [10.0, 100.0]  # (1+2+3+4) * (1, 10), also over ranks of one replica
        assert weight == results[0][1]


def collectives() -> dict[str, object]:
    from megatron_vlm.runtime.collectives import all_gather_objects, all_reduce_, all_to_all_rows

    rank, world = dist.get_rank(), dist.get_world_size()
    group, solo = dist.group.WORLD, dist.new_group([rank], use_local_synchronization=True)
    # rank r sends r+d rows to rank d: rank 0 sends none to itself
    send, recv = [rank + to for to in range(world)], [source + rank for source in range(world)]
    rows = (100 * rank + torch.arange(float(sum(send))))[:, None].repeat(1, 2).requires_grad_()
    received = all_to_all_rows(rows, send, recv, group)
    weight = torch.arange(1.0, len(received) + 1)[:, None] + 1000 * rank
    (received * weight).sum().backward()
    alone = all_to_all_rows(rows, [len(rows)], [len(rows)], solo)
    return {
        "received": received[:, 0].tolist(),
        "gradient": rows.grad[:, 1].tolist(),
        "alone": torch.equal(alone, rows) and alone.data_ptr() != rows.data_ptr(),
        "objects": all_gather_objects({"rank": rank}, group),
        "own object": all_gather_objects(rank, solo),
        "sum": all_reduce_(torch.tensor(rank + 1.0), group).item(),
        "maximum": all_reduce_(torch.tensor(rank + 1.0), group, dist.ReduceOp.MAX).item(),
        "own sum": all_reduce_(torch.tensor(rank + 1.0), solo).item(),
    }


def test_collectives(ranks: RankPool) -> None:
    world = 3
    sent = {r: [100 * r + i for i in range(sum(r + d for d in range(world)))] for r in range(world)}
    starts = {(r, d): sum(r + e for e in range(d)) for r in range(world) for d in range(world)}
    for rank, seen in enumerate(ranks.run(world, collectives)):
        assert seen["received"] == [
            value for r in range(world) for value in sent[r][starts[r, rank] : starts[r, rank] + r + rank]
        ]
        # gradient of the i-th row that came from `rank` at `to` is its place there, plus 1000*to
        expected = [
            1000 * to + 1 + sum(r + to for r in range(rank)) + i for to in range(world) for i in range(rank + to)
        ]
        assert seen["gradient"] == expected
        assert seen["alone"]
        assert seen["objects"] == [{"rank": r} for r in range(world)] and seen["own object"] == [rank]
        assert (seen["sum"], seen["maximum"], seen["own sum"]) == (6.0, 3.0, rank + 1.0)


def seeds(sizes: GridSizes) -> tuple[Coordinates, list[float]]:
    import random

    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_vlm.parallel.groups import build_grid
    from megatron_vlm.runtime.seeding import seed_everything

    grid = build_grid(sizes)
    seed_everything(7, grid)
    with get_cuda_rng_tracker().fork():
        inside_layer = torch.rand(()).item()
    return grid.coordinates, [random.random(), np.random.rand(), torch.rand(()).item(), inside_layer]


def test_seeds_differ_where_parameters_do(ranks: RankPool) -> None:
    """Common streams differ between stages only; the tracker's, inside split layers, between tensor ranks too."""
    drawn = ranks.run(4, seeds, GridSizes(tensor=2, pipeline=2))
    for at, numbers in drawn:
        for other, others in drawn:
            same_stage = at.pipeline == other.pipeline
            assert [a == b for a, b in zip(numbers, others, strict=True)] == [
                same_stage,
                same_stage,
                same_stage,
                at == other,
            ]
