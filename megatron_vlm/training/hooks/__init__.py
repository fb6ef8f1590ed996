"""Hooks watch a run and change nothing: console, JSON lines, curves. They run on rank 0 only."""

from pathlib import Path

from megatron_vlm.config import config_hash, to_yaml
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.console import ConsoleHook
from megatron_vlm.training.hooks.curves import CurvesHook
from megatron_vlm.training.hooks.jsonl import JsonLinesHook

__all__ = ["Hook", "build_hooks"]

logger = get_logger(__name__)


def build_hooks(config: Config, launch: Launch, start_step: int) -> list[Hook]:
    """The hooks a recipe asks for; none on other ranks than 0.

    Raises:
        ConfigError: checkpoint.directory cannot be written to.
    """
    if launch.rank != 0:
        return []
    directory = Path(config.checkpoint.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")
        metrics = JsonLinesHook(directory / "metrics.jsonl", start_step)
    except OSError as error:
        raise ConfigError(f"checkpoint.directory: found {directory}, needs a writable place ({error})") from error
    logger.info("recipe %s, in full in %s", config_hash(config), directory / "recipe.yaml")
    hooks: list[Hook] = [ConsoleHook(config.training.steps, start_step, config.logging), metrics]
    if config.logging.curves:
        hooks.append(CurvesHook(directory / "metrics.jsonl", directory / "curves.png"))
    return hooks
