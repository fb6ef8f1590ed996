"""Hooks watch a run and change nothing.

On rank 0: metrics, TensorBoard, console, drawings, summary. On every rank: the model's memory, and the guard against
numbers that are not finite.
"""

from pathlib import Path

from megatron_vlm.config import config_hash, to_yaml
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.planner.peak import Peak
from megatron_vlm.runtime.device import shares_cores
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.console import ConsoleHook
from megatron_vlm.training.hooks.curves import CurvesHook
from megatron_vlm.training.hooks.guard import FiniteGuard
from megatron_vlm.training.hooks.jsonl import EvaluationsHook, JsonLinesHook
from megatron_vlm.training.hooks.memory import MemoryHook
from megatron_vlm.training.hooks.summary import SummaryHook
from megatron_vlm.training.hooks.tensorboard import TensorBoardHook
from megatron_vlm.training.job import Job

__all__ = ["Hook", "build_hooks"]

logger = get_logger(__name__)


def build_hooks(job: Job, peak: Peak) -> list[Hook]:
    """The hooks a recipe asks for; on other ranks than 0, the collective ones alone.

    Args:
        job: what is run, its data opened where it trains.
        peak: of all ranks, for the summary.

    Raises:
        ConfigError, TrainingError: checkpoint.directory cannot be written to.
    """
    left_out = {} if job.data is None else job.data.dropped
    judges = not shares_cores(job.ranks_per_node)
    shown = showing_hooks(job.config, job.start_step, peak, left_out, judges) if job.grid.rank == 0 else []
    return [*shown, MemoryHook(job), FiniteGuard(job)]  # the guard last: what it ends is on record by then


def showing_hooks(
    config: Config, start_step: int, peak: Peak, left_out: dict[str, int], judges_ranks: bool = True
) -> list[Hook]:
    """Rank 0's. `left_out`: samples left out while indexing, by reason. Raises as `build_hooks`."""
    directory, logging = Path(config.checkpoint.directory), config.logging
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if config.training.mode == "eval":  # the rest belongs to the run that trains, which may be going on
            return [EvaluationsHook(directory), ConsoleHook(None, start_step, logging)]
        (directory / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")
        hooks: list[Hook] = [JsonLinesHook(directory, start_step, logging.sample_ids)]
        if logging.tensorboard:
            hooks.append(TensorBoardHook(directory / "tensorboard", start_step))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"checkpoint.directory: found {directory}, needs a writable place ({reason})") from error
    logger.info("recipe %s, in full in %s", config_hash(config), directory / "recipe.yaml")
    hooks.append(SummaryHook(directory / "summary.jsonl", config.training.num_steps, peak, left_out))
    hooks.append(ConsoleHook(config.training.num_steps, start_step, logging, judges_ranks))
    if logging.curves:
        hooks.append(CurvesHook(directory))
    return hooks
