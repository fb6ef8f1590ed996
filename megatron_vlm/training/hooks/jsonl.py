"""metrics.jsonl: one object per step, appended and flushed, so that a killed run keeps every line but the last.

A resumed run drops the lines after its starting step, which the lost run may have written, so each step stands once.
"""

import json
from pathlib import Path
from typing import Any

from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.meters import StepReport


class JsonLinesHook(Hook):
    """Appends every step's report to `path`, keeping the lines up to `start_step`."""

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= start_step] if start_step else []
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed in close)
        for line in kept:
            self._write(line)

    def after_step(self, report: StepReport) -> None:
        self._write(report.as_dict())

    def close(self) -> None:
        self.file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
