"""Hooks watch a run and change nothing: console, JSON lines, curves. They run on rank 0 only."""

from pathlib import Path

from megatron_vlm.config.schema import Config
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.console import ConsoleHook
from megatron_vlm.training.hooks.curves import CurvesHook
from megatron_vlm.training.hooks.jsonl import JsonLinesHook

__all__ = ["Hook", "build_hooks"]


def build_hooks(config: Config, launch: Launch, start_step: int) -> list[Hook]:
    """The hooks a recipe asks for; none on other ranks than 0."""
    if launch.rank != 0:
        return []
    directory = Path(config.checkpoint.directory)
    directory.mkdir(parents=True, exist_ok=True)
    hooks: list[Hook] = [
        ConsoleHook(config.training.steps, start_step, config.logging),
        JsonLinesHook(directory / "metrics.jsonl", start_step),
    ]
    if config.logging.curves:
        hooks.append(CurvesHook(directory / "metrics.jsonl", directory / "curves.png"))
    return hooks
