"""Reports as a run makes them, with numbers of the test's choice."""

from dataclasses import replace
from typing import Any

from megatron_vlm.training.held_out import EvaluationReport
from megatron_vlm.training.reporting.meters import StepReport
from megatron_vlm.training.reporting.ranks import RankComparison, RankFigures

STEP = StepReport(
    step=1,
    loss=1.0,
    grad_norm=0.5,
    learning_rates={"language": 1e-3, "projector": 1e-2},
    trained_tokens=10,
    tokens=20,
    padding_tokens=12,
    media=3,
    samples=4,
    blanked={},
    seconds=0.1,
    updated=True,
    tokens_per_second=200.0,
    tflops_per_rank=0.5,
    mfu=0.25,
    peak_memory_bytes=2**30,
    sample_ids=("a", "b", "c", "d"),
)


def step_report(step: int, **changes: Any) -> StepReport:
    """One step; `changes` are fields of StepReport."""
    return replace(STEP, step=step, **changes)


def evaluation_report(step: int, loss: float | None = 1.5, score: float | None = None) -> EvaluationReport:
    """One evaluation, of a task where there is a score."""
    return EvaluationReport(step, loss, 8, 40, {}, None if score is None else "exact_match", score)


def comparison(phase_seconds: dict[str, list[float]], peak_memory_bytes: list[int] | None = None) -> RankComparison:
    """Each phase's seconds by rank."""
    num_ranks = len(next(iter(phase_seconds.values())))
    memory = peak_memory_bytes or [2**30] * num_ranks
    return RankComparison(
        [
            RankFigures({phase: seconds[rank] for phase, seconds in phase_seconds.items()}, memory[rank])
            for rank in range(num_ranks)
        ]
    )
