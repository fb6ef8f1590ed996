"""The ranks of a job: how they start, how megatron-core arranges them, how they end.

A tool's main part:

    launch = read_launch()
    with fail_together(launch, debug=...):
        device = prepare(config.runtime.device, launch.local_world_size)
        init_world(launch, device, config.runtime.timeout_seconds)
        ...                                                     (groups: parallel.groups.build_grid)
        teardown()

The grid is given as plain numbers: the arrangement of ranks is parallel/'s business, one row up. The hazard is
megatron-core's module state, one grid per process: `teardown` forgets it, so that a test can build the next.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_vlm.runtime.failure import fail_together
from megatron_vlm.runtime.launch import Launch, connect_store, explain_no_store, keep_to_loopback, read_launch

if TYPE_CHECKING:
    import torch

__all__ = ["Launch", "fail_together", "init_grid", "init_world", "read_launch", "teardown"]


def init_world(launch: Launch, device: "torch.device", timeout_seconds: float, name: str = "world") -> None:
    """The default process group: gloo on the CPU, NCCL on GPUs, where it also takes this rank's GPU.

    Args:
        launch: this rank's place.
        device: from `runtime.device.prepare`.
        timeout_seconds: of every collective, and of the ranks' meeting.
        name: tells this world from others of the same job (`tools/bench.py` runs one per side).

    Raises:
        ParallelError: the ranks do not meet.
    """
    import torch
    import torch.distributed as dist

    on_gpu = device.type == "cuda"
    if launch.on_one_node:
        keep_to_loopback()
    if on_gpu:
        torch.cuda.set_device(launch.local_rank)
    try:
        store = dist.HashStore() if launch.world_size == 1 else connect_store(launch, name, timeout_seconds)
    except dist.DistError as error:
        raise explain_no_store(error, timeout_seconds) from error
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def world_timeout() -> timedelta:
    """Timeout of the default process group's collectives. Groups beside it must be made with it: they would have the
    library's default otherwise, 10 minutes for NCCL and 30 for gloo."""
    import torch.distributed as dist

    from megatron_vlm.runtime.device import current_device

    world = dist.group.WORLD
    assert world is not None, "there is no default process group"
    timeout: timedelta = world._get_backend(current_device()).options._timeout
    return timeout


def init_grid(tensor: int, pipeline: int, virtual_pipeline: int = 1, ulysses: int = 1, ring: int = 1) -> None:
    """megatron-core's parallel state: rank = tp + T*(cp + C*(dp + D*pp)), cp = ulysses rank + U * ring rank.

    Collectives of all its groups have the world's timeout. No extra gloo groups are made: optimizers are built with
    use_gloo_process_groups=False, checkpoints use the others.
    """
    from megatron.core import parallel_state

    context = ulysses * ring
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        hierarchical_context_parallel_sizes=[ulysses, ring] if context > 1 else None,
        distributed_timeout_minutes=world_timeout().total_seconds() / 60,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )


def teardown() -> None:
    """Forgets megatron-core's grid and ends the default process group, where there are any."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
