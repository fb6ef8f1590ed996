"""Steps and saves of a real job without the loop around them, for tests that look at one of the two."""

from pathlib import Path

from megatron_vlm.checkpoint.saver import CheckpointSaver
from megatron_vlm.training import schedule
from megatron_vlm.training.job import Job


def train_steps(job: Job, steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the next `steps` steps from the job's `start_step` on."""
    config = job.config
    losses, norms = [], []
    for batch in job.batches(steps):
        schedule.apply(job.optimizer.param_groups, batch.step, config.training.steps, config.optimizer, config.schedule)
        result = job.step(batch)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def save(job: Job, updates: int) -> Path:
    """Saves, and waits for it."""
    saver = CheckpointSaver(job.config.checkpoint)
    try:
        saver.start(job.state(updates))
        return saver.finish()[0]
    finally:
        saver.close()
