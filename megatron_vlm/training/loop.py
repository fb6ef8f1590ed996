"""The training loop: plan, step, hooks, checkpoint. A screen long, so that a reader can follow a whole run.

Its state is one number, the updates made: the loader, the schedule and the checkpoints are pure functions of it.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vlm.checkpoint.store import find_checkpoint, refuse_to_overwrite, save_checkpoint
from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training import schedule
from megatron_vlm.training.hooks import Hook, build_hooks
from megatron_vlm.training.job import Job, build_job
from megatron_vlm.training.meters import StepReport, make_report

logger = get_logger(__name__)


def train(config: Config, launch: Launch) -> Path:
    """Runs a recipe to its last step on this rank.

    Args:
        config: the recipe; the device is prepared and the default process group initialised.
        launch: this rank's place in the job.

    Returns:
        The directory of the last checkpoint: the one loaded where it leaves nothing to do.

    Raises:
        MegatronVlmError: anything the user can fix.
    """
    refuse_to_overwrite(config.checkpoint)
    job = build_job(config, launch.world_size)
    steps = config.training.steps
    if job.start_step >= steps:
        assert config.checkpoint.load is not None
        logger.info("nothing to do: %d of training.steps %d updates are made", job.start_step, steps)
        return find_checkpoint(config.checkpoint.load)
    batches = job.batches(steps - job.start_step)
    hooks = build_hooks(config, launch, job.start_step)  # last: they write, and nothing may be wrong any more
    try:
        return run_steps(job, batches, hooks)
    finally:
        for hook in hooks:
            hook.close()


def run_steps(job: Job, batches: Iterable[StepBatch], hooks: Sequence[Hook] = ()) -> Path:
    """Trains on the batches, up to the recipe's last step; returns the directory of the last checkpoint."""
    config, steps = job.config, job.config.training.steps
    saved: Path | None = None
    started = time.perf_counter()
    for batch in batches:
        schedule.apply(job.optimizer.param_groups, batch.step, steps, config.optimizer, config.schedule)
        result = job.step(batch)
        report: StepReport = make_report(batch, result, job.optimizer.param_groups, time.perf_counter() - started)
        for hook in hooks:
            hook.after_step(report)
        updates = batch.step + 1
        if updates == steps or (config.checkpoint.every_steps and updates % config.checkpoint.every_steps == 0):
            saved = save_checkpoint(job.state(updates))
            for hook in hooks:
                hook.after_save(saved, updates)
        started = time.perf_counter()
    assert saved is not None, "the batches end before a checkpoint is due"
    return saved
