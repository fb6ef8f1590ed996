"""metrics.jsonl and evaluation.jsonl: one object per step or evaluation, so that a killed run keeps every line but the
last.

A resumed run drops the lines after its starting step, which the lost run may have written, so each step stands once;
the shortened file is written beside and renamed into place. A number that is not finite is null: JSON has no other.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vlm.errors import TrainingError
from megatron_vlm.runtime import files
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.held_out import EvaluationReport
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.files import AppendedFile, replace_file
from megatron_vlm.training.reporting.meters import StepReport

logger = get_logger(__name__)

METRICS, EVALUATIONS = "metrics.jsonl", "evaluation.jsonl"
MAX_BYTES = 1 << 36  # of a file of lines: a run of 10^8 steps


class EvaluationsHook(Hook):
    """Writes evaluation.jsonl into `directory`; a step evaluated again has the newer line."""

    def __init__(self, directory: Path) -> None:
        self.evaluations = directory / EVALUATIONS

    def after_evaluation(self, report: EvaluationReport) -> None:
        others = [line for line in read_lines(self.evaluations) if line["step"] != report.step]
        replace_file(self.evaluations, b"".join(map(to_line, [*others, asdict(report)])))


class JsonLinesHook(EvaluationsHook):
    """Writes both files into `directory`, keeping the lines up to `start_step`.

    Args:
        sample_ids: each step's line also has the ids of its samples, in row order.
    """

    def __init__(self, directory: Path, start_step: int, sample_ids: bool = False) -> None:
        super().__init__(directory)
        self.sample_ids = sample_ids
        _shorten(self.evaluations, start_step)
        _shorten(directory / METRICS, start_step)
        self.metrics = AppendedFile(directory / METRICS)

    def after_step(self, report: StepReport) -> None:
        values = report.as_dict()
        if self.sample_ids:
            values["sample_ids"] = report.sample_ids
        self.metrics.write(to_line(values))

    def close(self) -> None:
        self.metrics.close()


def to_line(values: dict[str, Any]) -> bytes:
    """One object as a line of strict JSON."""
    return (json.dumps(_strict(values), allow_nan=False) + "\n").encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of such a file; a last line cut short by a kill is left out. Raises TrainingError where something
    stands there that cannot be read."""
    try:
        content = files.read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(f"checkpoint.directory: {path} cannot be read: {error.strerror or error}") from error
    lines, whole = content.decode("utf-8", errors="replace").split("\n")[:-1], []
    for number, line in enumerate(lines, start=1):
        try:
            whole.append(json.loads(line))
        except ValueError:  # a power cut leaves what was not on the disk yet as zeros
            logger.warning("%s line %d is damaged and left out", path, number)
    return whole


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_evaluated(directory: Path, step: int) -> bool:
    """Whether the run in `directory` was evaluated after `step` updates."""
    return any(line["step"] == step for line in read_lines(directory / EVALUATIONS))


def _shorten(path: Path, start_step: int) -> None:
    kept = [line for line in read_lines(path) if line["step"] <= start_step] if start_step else []
    replace_file(path, b"".join(map(to_line, kept)))
