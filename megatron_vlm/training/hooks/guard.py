"""The guard against numbers that are not finite: ends the run while its last checkpoint is still good.

Collective, and deterministic: loss, norm and whether there was an update are equal on every rank, so all ranks end at
the same step with the same error. A single update left out is no reason, since Adam goes on unharmed; many in a row, or
a loss that is no number, is. A step in which nothing was trained says nothing of the numbers, and is passed over. An
update can also overflow a weight, which no loss has seen yet when a checkpoint is due: hence a look at the weights
before every save.
"""

import math
from collections.abc import Sequence

import torch

from megatron_vlm.errors import NotFiniteError
from megatron_vlm.runtime.collectives import all_reduce_
from megatron_vlm.runtime.device import current_device
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.job import Job
from megatron_vlm.training.reporting.meters import StepReport

NUM_NAMED_SAMPLES = 32


class FiniteGuard(Hook):
    """Raises NotFiniteError, on every rank, naming step, loss, norm and samples. `job`: whose weights."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.num_left_out = 0  # updates, in a row
        self.report: StepReport | None = None

    def after_step(self, report: StepReport) -> None:
        if report.loss is None:
            return
        self.report = report
        self.num_left_out = 0 if report.updated else self.num_left_out + 1
        limit = self.job.config.training.max_nonfinite_steps
        if not math.isfinite(report.loss):
            raise self._error("the loss is not finite")
        if self.num_left_out >= limit:
            times = "an update was" if limit == 1 else f"{limit} updates in a row were"
            raise self._error(
                f"{times} left out, because gradients were not finite (training.max_nonfinite_steps {limit})"
            )

    def before_save(self, updates: int) -> None:
        finite = [torch.isfinite(parameter).all() for _, parameter in self.job.model.named_parameters()]
        all_finite = torch.stack(finite).all().to(current_device(), torch.int32)
        if not all_reduce_(all_finite, self.job.grid.world, torch.distributed.ReduceOp.MIN).item():
            raise self._error("a weight is not finite, so nothing is saved")

    def _error(self, reason: str) -> NotFiniteError:
        where = "training stopped"
        if self.report is not None:
            report = self.report
            assert report.loss is not None and report.grad_norm is not None, "a step that trained nothing was kept"
            where += f" after step {report.step}: loss {report.loss:.6g}, gradient norm {report.grad_norm:.6g}"
            reason += f"; samples of the step: {_some(report.sample_ids)}"
        return NotFiniteError(f"{where}: {reason}")


def _some(sample_ids: Sequence[str]) -> str:
    named, rest = sample_ids[:NUM_NAMED_SAMPLES], len(sample_ids) - NUM_NAMED_SAMPLES
    return ", ".join(named) + (f" and {rest} more (logging.sample_ids keeps all)" if rest > 0 else "")
