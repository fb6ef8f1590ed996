"""The console: a progress bar with step, loss, speed and time left; plain lines where there is no terminal."""

from pathlib import Path

from megatron_vlm.config.schema import LoggingConfig
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.progress import Progress
from megatron_vlm.training.held_out import EvaluationReport
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.reporting.meters import StepReport
from megatron_vlm.training.reporting.ranks import NUM_REPORTS, StragglerWatch

logger = get_logger(__name__)


class ConsoleHook(Hook):
    """Shows the run as it goes.

    Args:
        steps: updates of the whole run; None: a run that makes none, and shows no progress of them.
        start_step: updates already made.
        logging: how often, and whether at all.
        judges_ranks: a rank that stays behind is told; not where ranks take each other's cores, in turn.
    """

    def __init__(self, steps: int | None, start_step: int, logging: LoggingConfig, judges_ranks: bool = True) -> None:
        self.logging = logging
        self.watch = StragglerWatch() if judges_ranks else None
        shows = logging.progress and steps is not None
        self.bar = Progress("training", total=steps or 0, completed=start_step, enabled=shows)

    def after_step(self, report: StepReport) -> None:
        if report.step % self.logging.every_steps == 0:
            speed = f"{report.tokens_per_second:,.0f} tokens/s  MFU {report.mfu:.1%}"
            loss = "nothing" if report.loss is None else f"{report.loss:.4f}"
            self.bar.update(report.step, f"loss {loss}  {speed}")
        if report.loss is None:
            logger.warning("step %d: every sample was left out, so nothing was trained or updated", report.step)
        elif not report.updated:
            logger.warning("step %d: a gradient was not finite, the update was left out", report.step)
        if report.ranks is not None and self.watch is not None:
            straggler = self.watch.see(report.ranks.straggler)
            if straggler is not None:
                told = "step %d and the %d compared before it: %s"
                logger.warning(told, report.step, NUM_REPORTS - 1, straggler)

    def after_save(self, directory: Path, updates: int) -> None:
        logger.info("saved %s after %d steps", directory, updates)

    def after_evaluation(self, report: EvaluationReport) -> None:
        score = "" if report.score is None else f", {report.task} {report.score:.1%}"
        not_asked = f", {sum(report.not_asked.values())} not asked" if report.not_asked else ""
        loss = "of nothing" if report.loss is None else f"{report.loss:.4f}"
        logger.info(
            "evaluation after %d steps: loss %s%s (%d samples%s)",
            report.step,
            loss,
            score,
            report.num_samples,
            not_asked,
        )

    def close(self) -> None:
        self.bar.close()
