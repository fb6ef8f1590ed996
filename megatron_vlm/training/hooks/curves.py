"""curves.png and ranks_phases.png: the run over its steps, and its last compared step over the ranks.

Drawn when the run saves and when it ends; the second where there are several ranks.
"""

import io
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.files import replace_file
from megatron_vlm.training.hooks.jsonl import EVALUATIONS, METRICS, read_lines
from megatron_vlm.training.meters import StepReport
from megatron_vlm.training.ranks import RankComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, RANKS = "curves.png", "ranks_phases.png"
MAX_RANKS_WITH_NUMBERS, MAX_SCORES = 16, 10
Entries = list[dict[str, Any]]

logger = get_logger(__name__)


class CurvesHook(Hook):
    """Draws both pictures into `directory`, from the lines there and from the last compared step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.compared: StepReport | None = None

    def after_step(self, report: StepReport) -> None:
        if report.ranks is not None and len(report.ranks.figures) > 1:
            self.compared = report

    def after_save(self, directory: Path, updates: int) -> None:
        self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        try:
            draw_curves(self.directory)
            if self.compared is not None and self.compared.ranks is not None:
                draw_ranks(self.compared.ranks, self.compared.step, self.directory / RANKS)
        except Exception as error:  # whatever it is, a picture is not worth a run
            logger.warning("%s could not be drawn: %s", self.directory / CURVES, error)


def draw_curves(directory: Path) -> None:
    """Reads the run's lines and writes curves.png with four panels; does nothing before the first step."""
    from matplotlib.figure import Figure

    entries, evaluations = read_lines(directory / METRICS), read_lines(directory / EVALUATIONS)
    if not entries:
        return
    figure = Figure(figsize=(9, 10), layout="constrained")
    loss, norm, rate, speed = figure.subplots(4, 1, sharex=True, height_ratios=[3, 1, 1, 1])
    _draw_loss(loss, entries, evaluations)
    steps = [entry["step"] for entry in entries]
    norm.plot(steps, values_of(entries, "grad_norm"), color="C1", linewidth=0.8)
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    for component in entries[-1]["learning_rates"]:
        rate.plot(steps, [entry["learning_rates"].get(component) for entry in entries], label=component)
    rate.set_ylabel("learning rate")
    rate.legend(frameon=False)
    speeds = values_of(entries, "tokens_per_second")
    speed.plot(steps, speeds, color="0.75", linewidth=0.8)
    speed.plot(steps, smooth(speeds), color="C2")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step")
    for axes in (loss, norm, rate, speed):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, directory / CURVES)


def _draw_loss(axes: "Axes", entries: Entries, evaluations: Entries) -> None:
    steps, losses = [entry["step"] for entry in entries], values_of(entries, "loss")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="step")
    axes.plot(steps, smooth(losses), color="C0", label="moving mean")
    if evaluations:
        points = [entry["step"] for entry in evaluations]
        axes.plot(points, values_of(evaluations, "loss"), "o-", color="C3", markersize=5, label="held out")
        scored = [entry for entry in evaluations if entry["score"] is not None]
        scores = [(entry["step"], entry["score"]) for entry in scored]
        for step, score in scores[:: -max(1, -(-len(scores) // MAX_SCORES))]:
            axes.annotate(f"{score:.0%}", (step, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top")
        if scores:
            axes.set_title(f"at the top: {scored[-1]['task']}", fontsize="medium", loc="left")
    axes.set_ylabel("loss, nats per trained token")
    axes.legend(frameon=False)


def draw_ranks(ranks: RankComparison, step: int, image: Path) -> None:
    """A heat map, phases by ranks: the colour is a time's ratio to its phase's median, the number milliseconds."""
    from matplotlib.figure import Figure

    phases = list(ranks.phases)
    seconds = [[figures.phase_seconds[phase] for figures in ranks.figures] for phase in phases]
    ratios = [[value / median(row) if median(row) else 1.0 for value in row] for row in seconds]
    num_ranks = len(ranks.figures)
    figure = Figure(figsize=(min(16.0, 3.5 + 0.7 * num_ranks), 1.2 + 0.5 * len(phases)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(ratios, aspect="auto", cmap="coolwarm", vmin=0.5, vmax=1.5)  # grey: as all the others
    axes.set_yticks(range(len(phases)), [phase.replace("_", " ") for phase in phases])
    axes.set_xlabel("rank")
    if num_ranks <= MAX_RANKS_WITH_NUMBERS:
        axes.set_xticks(range(num_ranks))
        for y, row in enumerate(seconds):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value * 1e3:,.0f}", ha="center", va="center", fontsize="small")
    figure.colorbar(drawn, label="to the phase's median", extend="both")
    axes.set_title(f"time by phase, ms, step {step}", fontsize="medium")
    _save(figure, image)


def values_of(entries: Entries, name: str) -> list[float]:
    """One number of every line; NaN, a gap in a curve, where it was not finite."""
    return [float("nan") if entry[name] is None else entry[name] for entry in entries]


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving mean, corrected for its start (as Adam's moments are); passes over what is not a number."""
    mean, count, smoothed = 0.0, 0, []
    for value in values:
        if value == value:
            count += 1
            mean = weight * mean + (1.0 - weight) * value
        smoothed.append(mean / (1.0 - weight**count) if count else value)
    return smoothed


def _save(figure: "Figure", image: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    replace_file(image, content.getvalue())
