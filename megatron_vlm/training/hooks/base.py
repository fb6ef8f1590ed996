"""What a hook can see. Each method does nothing unless overridden."""

from pathlib import Path

from megatron_vlm.training.meters import StepReport


class Hook:
    """Watches a run on rank 0."""

    def after_step(self, report: StepReport) -> None:
        """Called after every update."""

    def after_save(self, directory: Path, updates: int) -> None:
        """Called after a checkpoint was published."""

    def close(self) -> None:
        """Called once when the run ends, also by an error."""
