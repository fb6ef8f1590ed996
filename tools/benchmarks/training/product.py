"""Our side of a comparison: the job that tools/train.py builds, and its step."""

import time
from typing import Any

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.planner.flops import model_shape, step_flops
from megatron_vlm.runtime.launch import Launch
from megatron_vlm.training import schedule
from megatron_vlm.training.job import build_job


class ProductSide:
    """Builds the job of a recipe and holds some of its batches; see `sides.Side`."""

    def __init__(self, config: Config, launch: Launch, num_batches: int) -> None:
        self.config = config
        self.job = build_job(config, launch.world_size, ranks_per_node=launch.local_world_size)
        self.replica_ranks = self.job.grid.sizes.replica
        self.shape = model_shape(self.job.model.vision, self.job.model.language[0].spec, config.model)
        started = time.perf_counter()
        self.batches = list(self.job.batches(num_batches))
        self.data_seconds = (time.perf_counter() - started) / num_batches
        self.row_tokens = [batch.padded_tokens for batch in self.batches]

    def step(self, number: int, exact_times: bool) -> tuple[Any, dict[str, float]]:
        """One update."""
        config = self.config
        groups = self.job.optimizer.param_groups
        schedule.apply(groups, number, config.training.num_steps, config.optimizer, config.schedule)
        result = self.job.step(self.batches[number % len(self.batches)], exact_times)
        return result.loss, result.phase_seconds

    def losses(self, found: list[Any]) -> list[float]:
        """They are global already."""
        return found

    def flops(self, batch: StepBatch, trained_tokens: int) -> int | None:
        """FLOPs by `planner.flops`."""
        return step_flops(self.shape, batch.sample_tokens, trained_tokens, batch.num_media)
