"""This rank's process groups: megatron-core's own, the replica group it lacks, and the vision chunk's collection.

Groups are values that are passed on; nobody below asks megatron-core's module state for one. Making a group is a world
collective: every rank calls `build_grid` once, with the same sizes.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_vlm.errors import ParallelError
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.runtime.collectives import all_reduce_
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.distributed import init_grid, world_timeout

__all__ = ["Coordinates", "Grid", "GridSizes", "build_grid", "vision_process_groups"]


@dataclass(frozen=True)
class Grid:
    """This rank's place, and the groups it belongs to."""

    sizes: GridSizes
    rank: int
    coordinates: Coordinates
    tensor: ProcessGroup
    context: ProcessGroup  # ulysses x ring
    ulysses: ProcessGroup
    ring: ProcessGroup
    data: ProcessGroup
    data_context: ProcessGroup  # data x context: gradients of the language model are reduced over it
    pipeline: ProcessGroup
    replica: ProcessGroup  # tensor x context x pipeline; group rank = replica rank
    world: ProcessGroup
    solo: ProcessGroup  # this rank alone

    @property
    def replica_rank(self) -> int:
        """This rank within its replica."""
        return self.sizes.replica_rank(self.coordinates)


def build_grid(sizes: GridSizes, virtual_pipeline: int = 1) -> Grid:
    """Arranges the ranks of the default process group, in megatron-core and here. All ranks call it.

    Raises:
        ParallelError: the sizes need another number of ranks.
    """
    world = dist.group.WORLD
    assert world is not None, "there is no default process group"
    rank, world_size = world.rank(), world.size()
    if sizes.world != world_size:
        raise ParallelError(f"number of ranks: found {world_size}, needed {sizes.world} for {sizes}")
    init_grid(sizes.tensor, sizes.pipeline, virtual_pipeline, sizes.ulysses, sizes.ring)
    coordinates, timeout = sizes.coordinates(rank), world_timeout()
    solo = dist.new_group([rank], timeout=timeout, use_local_synchronization=True)
    ulysses, ring = (solo, solo)
    if sizes.context > 1:  # megatron-core keeps the last grid's where this one has none
        ulysses, ring = parallel_state.get_hierarchical_context_parallel_groups()
        all_reduce_(torch.zeros(1, device=current_device()), ring)  # NCCL connects a group in its first collective
    replicas = [dist.new_group(sizes.replica_ranks(data), timeout=timeout) for data in range(sizes.data)]
    return Grid(
        sizes=sizes,
        rank=rank,
        coordinates=coordinates,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        ulysses=ulysses,
        ring=ring,
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        replica=replicas[coordinates.data],
        world=world,
        solo=solo,
    )


def vision_process_groups(grid: Grid) -> ProcessGroupCollection:
    """Groups of the vision chunk: replicated on every rank, its gradients and optimizer shards over the whole world."""
    world, solo = grid.world, grid.solo
    return ProcessGroupCollection(
        dp=world,
        dp_cp=world,
        intra_dist_opt=world,
        tp=solo,
        pp=solo,
        ep=solo,
        mp=solo,
        expt_dp=solo,
        tp_ep_pp=solo,
    )
