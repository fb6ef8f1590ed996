"""metrics.jsonl: one object per step, appended and flushed, so that a killed run keeps every line but the last.

A resumed run drops the lines after its starting step, which the lost run may have written, so each step stands once;
the shortened file is written beside and renamed into place.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.meters import StepReport


class JsonLinesHook(Hook):
    """Appends every step's report to `path`, keeping the lines up to `start_step`."""

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= start_step] if start_step else []
        beside = path.with_name(f".{path.name}.partial")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(beside, path)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def after_step(self, report: StepReport) -> None:
        self.file.write(json.dumps(report.as_dict()) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
