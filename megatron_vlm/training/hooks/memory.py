"""Memory of the model itself on the fullest rank, told once: after the first update, when the moments exist.

Collective: every rank counts its own part.
"""

from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.job import Job
from megatron_vlm.training.reporting.memory import GIBIBYTE, model_memory
from megatron_vlm.training.reporting.meters import StepReport

logger = get_logger(__name__)


class MemoryHook(Hook):
    """Logs parameters, gradients and optimizer state of the language model and of the vision encoder."""

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job

    def after_step(self, report: StepReport) -> None:
        if self.job is None or not report.updated:
            return
        by_rank = all_gather_objects(model_memory(self.job), self.job.grid.world)
        self.job = None
        for component in by_rank[0]:
            totals = [sum(memory[component].values()) for memory in by_rank]
            fullest = max(range(len(totals)), key=lambda rank: totals[rank])
            parts = ", ".join(f"{kind} {n / GIBIBYTE:.3f}" for kind, n in by_rank[fullest][component].items())
            logger.info(
                "memory of the %s, GiB: %.3f on rank %d, the fullest (%s); %.3f on average",
                {"language": "language model", "vision": "vision encoder"}[component],
                totals[fullest] / GIBIBYTE,
                fullest,
                parts,
                sum(totals) / len(totals) / GIBIBYTE,
            )
