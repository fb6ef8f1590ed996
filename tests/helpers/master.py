"""The body of the master test: some steps of the real job in a layout, and what it did to every tensor, made whole.

Runs inside a rank. Gradients and weights come back as whole tensors by global name: data-parallel shards of the
distributed optimizer are gathered here, tensor and pipeline shards in `assemble`, in the test's own process.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.schema import Config
from megatron_vlm.training import schedule
from megatron_vlm.training.job import Job, build_job
from tests.helpers import faults

Tensors = dict[str, Tensor]


@dataclass
class RankRecord:
    """What one rank saw: losses and norms per step; its shards of the first gradients and of the weights."""

    coordinates: Any
    losses: list[float]
    norms: list[float]
    gradients: Tensors
    before: Tensors
    after: Tensors


def run_layout(recipe: dict[str, Any], steps: int = 5, fault: str | None = None) -> RankRecord:
    """Trains `steps` steps of `recipe` through the product's own job, loader and step."""
    config = Config.model_validate(recipe)
    with faults.planted(fault):
        job = build_job(config, torch.distributed.get_world_size())
        gradients: Tensors = {}
        before = weights(job)
        record_first_gradients(job, gradients)
        losses, norms = train_steps(job, steps)
        return RankRecord(job.grid.coordinates, losses, norms, gradients, before, weights(job))


def train_steps(job: Job, steps: int) -> tuple[list[float], list[float]]:
    """The loop without hooks: losses and gradient norms of the next `steps` steps."""
    config = job.config
    losses, norms = [], []
    for batch in job.batches(steps):
        schedule.apply(job.optimizer.param_groups, batch.step, config.training.steps, config.optimizer, config.schedule)
        result = job.step(batch)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def record_first_gradients(job: Job, into: Tensors) -> None:
    """Makes the first optimizer step leave the final, scaled, unclipped gradients behind."""
    original = job.optimizer.step

    def step() -> Any:
        if not into:
            for chunk in [*job.language, job.vision]:
                gather_gradient_shards(chunk)
            into.update({name: p.main_grad.clone() for name, p in trained(job)})
        return original()

    job.optimizer.step = step


def gather_gradient_shards(chunk: Any) -> None:
    """With the distributed optimizer each rank has reduced its own slice of a bucket: fetch the others' slices."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            slices = bucket.grad_data.chunk(group.size())
            gathered = [torch.empty_like(part) for part in slices]
            torch.distributed.all_gather(gathered, slices[group.rank()].contiguous(), group=group)
            for part, whole in zip(slices, gathered, strict=True):
                part.copy_(whole)


def trained(job: Job) -> list[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) of everything on this rank that trains."""
    return [(name, p) for name, p in job.model.named_parameters() if p.requires_grad]


def weights(job: Job) -> Tensors:
    """This rank's shards of the trained parameters."""
    for chunk in job.language:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return {name: p.detach().clone() for name, p in trained(job)}
