"""Bodies of the master test and of the layout check's tests: they run inside the ranks of the pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.data.fetch import loader
from megatron_vlm.models.description import describe_model
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.training.job import Job, build_job
from megatron_vlm.training.layout_check.check import LayoutReport, check_layout, place_in
from megatron_vlm.training.layout_check.record import Record, observe
from megatron_vlm.training.layout_check.reference import one_process, run_reference
from megatron_vlm.training.layout_check.shrink import shrink
from tests.helpers.faults import planted as faults


def run_layout(recipe: dict[str, Any], steps: int = 5, fault: str | None = None) -> Record:
    """Trains `steps` steps of `recipe` through the product's own job, loader and step."""
    config = Config.model_validate(recipe)
    with faults.planted(fault):
        return observe(build_job(config, torch.distributed.get_world_size()), steps)


@dataclass(frozen=True)
class FixedRows:
    """A plan of the test's own: the samples of each row, by step; from the first step again after the last."""

    rows: list[list[tuple[int, ...]]]

    def samples_by_row(self, step: int) -> list[tuple[int, ...]]:
        return self.rows[step % len(self.rows)]


def run_rows(recipe: dict[str, Any], rows: list[list[tuple[int, ...]]], steps: int, fault: str | None = None) -> Record:
    """`run_layout` over chosen rows of sample numbers; where the recipe does not pack, a row for each of their samples,
    in the same order."""
    if Config.model_validate(recipe).data.packing != "rows":
        rows = [[(sample,) for row in of_step for sample in row] for of_step in rows]
    with mock.patch.object(loader, "make_plan", lambda config, samples, language: FixedRows(rows)):
        return run_layout(recipe, steps, fault)


def trained(job: Job) -> list[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) of everything on this rank that trains."""
    return [(name, p) for name, p in job.model.named_parameters() if p.requires_grad]


@dataclass(frozen=True)
class RecordedReference:
    """One process' record from a file, in the place of the child that would make it."""

    path: Path

    def record(self, limit_seconds: float) -> Record:
        return Record(**torch.load(self.path, weights_only=True))

    def close(self) -> None: ...


def record_reference(recipe: dict[str, Any], num_ranks: int, path: Path) -> None:
    """What the child of a check on `num_ranks` ranks would record, made in this rank, which nothing is wrong with."""
    config = Config.model_validate(recipe)
    small, samples = shrink(config, num_ranks, describe_model(config.model))
    small = place_in(small, samples, path.parent)
    torch.save(run_reference(one_process(small)).as_dict(), path)


def run_check(recipe: dict[str, Any], fault: str | None = None, recorded: Path | None = None) -> LayoutReport:
    """The product's check, with a fault in this rank only; `recorded` stands for the child.

    Raises:
        AssertionError: the layout hangs; it tells where. The rank cannot be used again.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    launch = Launch(rank, num_ranks, rank, num_ranks)
    with faults.planted(fault):
        if recorded is None:
            report = check_layout(Config.model_validate(recipe), launch)
        else:
            known = RecordedReference(recorded)
            report = check_layout(Config.model_validate(recipe), launch, lambda small, folder: known)
    assert report.hang is None, f"phase {report.hang.first.phase!r}: {report.hang}"
    return report
