"""Numbers of one step, measured on every rank: loss, norm, rates, tokens, time, FLOPs, memory, as plain numbers.

Hazard: at the compared steps `report` is collective; every rank makes every step's report.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.config.megatron import DTYPES
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.planner.flops import model_shape, step_flops
from megatron_vlm.planner.peak import peak_of_ranks
from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.training.job import Job
from megatron_vlm.training.reporting.memory import process_memory
from megatron_vlm.training.reporting.ranks import DATA, RankComparison, RankFigures
from megatron_vlm.training.step import StepResult


@dataclass(frozen=True)
class SourceReport:
    """One source of a mixture in a step."""

    samples: int
    tokens: int  # images' included
    trained_tokens: int
    loss: float | None  # mean of its trained tokens; None where there were none


@dataclass(frozen=True)
class StepReport:
    """One step in numbers; of the global batch where not said otherwise."""

    step: int  # updates made, this one included
    # mean training loss of the trained tokens, nats: cross entropy, and what the recipe's `loss` adds; it and the norm
    # are None where no token was trained
    loss: float | None
    grad_norm: float | None
    learning_rates: dict[str, float]  # per component
    trained_tokens: int
    tokens: int  # all but padding, images' included
    padding_tokens: int  # which fill up the rows
    media: int  # images
    samples: int
    blanked: dict[str, int]  # samples left untrained because of an image, by reason
    seconds: float  # loading included
    updated: bool
    tokens_per_second: float
    tflops_per_rank: float  # model TFLOP/s
    mfu: float  # of all ranks' peak, 0..1
    peak_memory_bytes: int  # of this rank
    sample_ids: tuple[str, ...]  # in row order
    ranks: RankComparison | None = None  # at the compared steps
    sources: dict[str, SourceReport] = field(default_factory=dict)  # of a mixture, by name

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the sample ids."""
        values = {name: value for name, value in vars(self).items() if name not in ("sample_ids", "ranks", "sources")}
        if self.sources:
            values["sources"] = {name: vars(source) for name, source in self.sources.items()}
        return values if self.ranks is None else {**values, "ranks": self.ranks.as_dict()}


class Meter:
    """Times a job's steps and makes their reports; making it is collective.

    Args:
        job: whose steps.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.shape = model_shape(job.model.vision, job.model.language[0].spec, job.config.model)
        self.peak = peak_of_ranks(DTYPES[job.config.precision.params], job.grid.world, job.ranks_per_node)
        self._started = self._data_seconds = 0.0

    def timed(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """The batches; a step's time begins when its batch is asked for."""
        self._started = time.perf_counter()
        for batch in batches:
            self._data_seconds = time.perf_counter() - self._started
            yield batch
            self._started = time.perf_counter()

    def compares(self, batch: StepBatch) -> bool:
        """Whether this step is compared over the ranks; its phases are then timed exactly."""
        every = self.job.config.logging.ranks_every_steps
        return every > 0 and (batch.step + 1) % every == 0

    def report(self, batch: StepBatch, result: StepResult) -> StepReport:
        """Joins the batch, the step's result and the rates in force. The step ends here."""
        seconds = time.perf_counter() - self._started
        memory = process_memory()
        figures = RankFigures({DATA: self._data_seconds, **result.phase_seconds}, memory.peak_bytes)
        world = self.job.grid.world
        ranks = RankComparison(all_gather_objects(figures, world)) if self.compares(batch) else None
        flops = step_flops(self.shape, batch.sample_tokens, result.num_trained_tokens, batch.num_media)
        return StepReport(
            step=batch.step + 1,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rates={group["component"]: group["lr"] for group in self.job.optimizer.param_groups},
            trained_tokens=result.num_trained_tokens,
            tokens=batch.num_tokens,
            padding_tokens=batch.num_padding_tokens,
            media=batch.num_media,
            samples=len(batch.sample_ids),
            blanked=result.blanked,
            seconds=seconds,
            updated=result.updated,
            tokens_per_second=batch.num_tokens / seconds,
            tflops_per_rank=flops / seconds / world.size() / 1e12,
            mfu=flops / seconds / self.peak.flops_per_second,
            peak_memory_bytes=memory.peak_bytes,
            sample_ids=batch.sample_ids,
            ranks=ranks,
            sources=report_sources(batch, result),
        )


def report_sources(batch: StepBatch, result: StepResult) -> dict[str, SourceReport]:
    """Numbers of each source of a mixture, by name."""
    samples, tokens = Counter(batch.sample_sources), Counter[int]()
    for source, num_tokens in zip(batch.sample_sources, batch.sample_tokens if batch.source_names else (), strict=True):
        tokens[source] += num_tokens
    return {
        name: SourceReport(
            samples[number], tokens[number], sums.num_tokens, sums.loss / sums.num_tokens if sums.num_tokens else None
        )
        for number, (name, sums) in enumerate(zip(batch.source_names, result.sources, strict=True))
    }
