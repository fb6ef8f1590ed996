"""What one step reports: loss, norm, rates, tokens and time, as plain numbers every hook can use."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_vlm.data.batch import StepBatch
from megatron_vlm.training.step import StepResult


@dataclass(frozen=True)
class StepReport:
    """One step in numbers. `tokens` counts every token of the global batch that is not padding."""

    step: int  # updates made, this one included
    loss: float  # mean cross entropy of the trained tokens, nats
    grad_norm: float
    learning_rates: dict[str, float]  # per component
    trained_tokens: int
    tokens: int
    media: int  # pictures of the global batch
    seconds: float  # loading included
    updated: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def make_report(batch: StepBatch, result: StepResult, groups: list[dict[str, Any]], seconds: float) -> StepReport:
    """Joins the batch, the step's result and the rates in force."""
    return StepReport(
        step=batch.step + 1,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rates={group["component"]: group["lr"] for group in groups},
        trained_tokens=result.num_trained_tokens,
        tokens=batch.num_tokens,
        media=batch.num_media,
        seconds=seconds,
        updated=result.updated,
    )
