"""The end of a run in a few numbers: on the console, and as the last line of summary.jsonl.

summary.jsonl has one object per attempt, in order: a run that was resumed has as many lines as it was started times.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from megatron_vlm.planner.peak import Peak
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.held_out import EvaluationReport
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.files import AppendedFile
from megatron_vlm.training.hooks.jsonl import to_line
from megatron_vlm.training.reporting.meters import StepReport

logger = get_logger(__name__)


class SummaryHook(Hook):
    """Sums up this attempt, from its first step to whatever ends it; says nothing of one without a step.

    Args:
        path: of summary.jsonl.
        steps: updates of the whole run.
        peak: what MFU is measured against.
        left_out: samples left out while indexing, by reason.
    """

    def __init__(self, path: Path, steps: int, peak: Peak, left_out: dict[str, int]) -> None:
        self.path, self.steps, self.peak, self.left_out = path, steps, peak, left_out
        self.blanked: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.sources: dict[str, Counter[str]] = {}
        self.losses: defaultdict[str, float] = defaultdict(float)  # summed over trained tokens, by source
        self.mfu_seconds = self.tflops_seconds = 0.0
        self.peak_memory_bytes = 0
        self.last: StepReport | None = None
        self.loss: float | None = None  # of the last step that trained something
        self.evaluation: EvaluationReport | None = None

    def after_step(self, report: StepReport) -> None:
        self.blanked.update(report.blanked)
        for name in ("tokens", "padding_tokens", "trained_tokens", "samples", "media", "seconds"):
            self.totals[name] += getattr(report, name)
        for name, source in report.sources.items():
            self.sources.setdefault(name, Counter()).update(
                samples=source.samples, tokens=source.tokens, trained_tokens=source.trained_tokens
            )
            self.losses[name] += (source.loss or 0.0) * source.trained_tokens
        self.totals["steps"] += 1
        self.totals["updates_left_out"] += not report.updated
        self.loss = self.loss if report.loss is None else report.loss
        self.mfu_seconds += report.mfu * report.seconds
        self.tflops_seconds += report.tflops_per_rank * report.seconds
        self.peak_memory_bytes = max(
            self.peak_memory_bytes,
            report.peak_memory_bytes,
            0 if report.ranks is None else int(report.ranks.peak_memory.max),
        )
        self.last = report

    def after_evaluation(self, report: EvaluationReport) -> None:
        self.evaluation = report

    def close(self) -> None:
        if self.last is None:
            return
        summary = self.summary(self.last)
        _log(summary)
        file = AppendedFile(self.path)
        file.write(to_line(summary))
        file.close()

    def summary(self, last: StepReport) -> dict[str, Any]:
        """Plain values."""
        seconds = self.totals["seconds"]
        evaluation = self.evaluation
        return {
            "step": last.step,
            "of_steps": self.steps,
            **self.totals,
            "padding": self.totals["padding_tokens"] / (self.totals["tokens"] + self.totals["padding_tokens"]),
            "loss": self.loss,
            "tokens_per_second": self.totals["tokens"] / seconds,
            "tflops_per_rank": self.tflops_seconds / seconds,
            "mfu": self.mfu_seconds / seconds,
            "peak_flops": self.peak.flops_per_second,
            "peak_flops_source": self.peak.source,
            "peak_memory_bytes": self.peak_memory_bytes,
            "samples_left_out": self.left_out,
            "samples_blanked": dict(self.blanked),
            "evaluation": None if evaluation is None else vars(evaluation),
            **({"sources": self._sources()} if self.sources else {}),
        }

    def _sources(self) -> dict[str, dict[str, float | None]]:
        """Totals of each source of a mixture, and the mean loss of its trained tokens."""
        return {
            name: {**counts, "loss": self.losses[name] / counts["trained_tokens"] if counts["trained_tokens"] else None}
            for name, counts in self.sources.items()
        }


def _log(summary: dict[str, Any]) -> None:
    logger.info(
        "%d steps to step %d of %d in %.1f s: %s tokens, %s samples, %s images; %.1f%% padding; loss %s",
        summary["steps"],
        summary["step"],
        summary["of_steps"],
        summary["seconds"],
        *(f"{summary[name]:,}" for name in ("tokens", "samples", "media")),
        100 * summary["padding"],
        "none" if summary["loss"] is None else f"{summary['loss']:.4f}",
    )
    logger.info(
        "%s tokens/s, %.3g TFLOP/s per rank, MFU %.1f%% of %.3g FLOP/s (%s), peak memory %.2f GiB",
        f"{summary['tokens_per_second']:,.0f}",
        summary["tflops_per_rank"],
        100 * summary["mfu"],
        summary["peak_flops"],
        summary["peak_flops_source"],
        summary["peak_memory_bytes"] / 2**30,
    )
    for name, source in summary.get("sources", {}).items():
        logger.info(
            "source %s: %s samples, %s tokens (%.1f%% of all), loss %s", name, f"{source['samples']:,}",
            f"{source['tokens']:,}", 100 * source["tokens"] / summary["tokens"],
            "none" if source["loss"] is None else f"{source['loss']:.4f}",
        )  # fmt: skip
    for name, what in (("samples_left_out", "left out while indexing"), ("samples_blanked", "left untrained")):
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(summary[name].items()))
        logger.info("samples %s: %s", what, reasons or "none")
