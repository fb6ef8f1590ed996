"""The interface of hooks. Each method does nothing unless overridden.

Most hooks only show and run on rank 0. A collective hook runs on every rank; it may also end the run, on all of them.
"""

from pathlib import Path

from megatron_vlm.training.held_out import EvaluationReport
from megatron_vlm.training.reporting.meters import StepReport


class Hook:
    """Watches a run."""

    def after_step(self, report: StepReport) -> None:
        """Called after every update."""

    def before_save(self, updates: int) -> None:
        """Called when a checkpoint is due, before anything of it is written."""

    def after_save(self, directory: Path, updates: int) -> None:
        """Called after a checkpoint was published."""

    def after_evaluation(self, report: EvaluationReport) -> None:
        """Called after every evaluation."""

    def close(self) -> None:
        """Called once when the run ends, also by an error."""
