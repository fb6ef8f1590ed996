"""curves.png and ranks_phases.png: the run over its steps, and its last compared step over the ranks.

Drawn while the run goes on (every DRAWING_SECONDS at most, and seldom enough to cost 0.2% of the time), when it saves
and when it ends; the second where there are several ranks. The mean of a curve is the plain one over the last steps,
whose number the legend tells: what is shown at a step is in no way ahead of or behind the numbers it is made of.
"""

import io
import time
from collections import Counter, deque
from math import fsum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import one_line
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.files import replace_file
from megatron_vlm.training.hooks.jsonl import EVALUATIONS, METRICS, read_lines
from megatron_vlm.training.reporting.meters import StepReport
from megatron_vlm.training.reporting.ranks import SLOW_SECONDS, RankComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, RANKS = "curves.png", "ranks_phases.png"
MAX_RANKS_WITH_NUMBERS, MAX_SCORES, MAX_SOURCES = 16, 10, 10
DRAWING_SECONDS = 30.0  # from the end of one drawing to the next
DRAWING_SHARE = 0.002  # of the time, at most: all ranks wait for it
MEAN_SHARE = 0.05  # of all steps are in the mean, and at least MIN_MEAN_STEPS
MIN_MEAN_STEPS = 10
DECADE = 10.0  # a loss that spans so much is drawn on a logarithmic axis
Entries = list[dict[str, Any]]

logger = get_logger(__name__)


class CurvesHook(Hook):
    """Draws both curves into `directory`, from the lines there and from the last compared step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.compared: StepReport | None = None
        self.due = time.monotonic() + DRAWING_SECONDS

    def after_step(self, report: StepReport) -> None:
        if report.ranks is not None and len(report.ranks.figures) > 1:
            self.compared = report
        if time.monotonic() >= self.due:
            self._draw()

    def after_save(self, directory: Path, updates: int) -> None:
        self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        started = time.monotonic()
        try:
            draw_curves(self.directory)
            if self.compared is not None and self.compared.ranks is not None:
                draw_ranks(self.compared.ranks, self.compared.step, self.directory / RANKS)
        except Exception as error:  # whatever it is, a drawing is not worth a run
            logger.warning("%s could not be drawn: %s", self.directory / CURVES, one_line(error))
        ended = time.monotonic()
        self.due = ended + max(DRAWING_SECONDS, (ended - started) / DRAWING_SHARE)


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
    speed.plot(steps, moving_mean(speeds, num_mean_steps(len(steps))), color="C2")
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
    num_steps = num_mean_steps(len(steps))
    axes.plot(steps, moving_mean(losses, num_steps), color="C0", label=f"mean of the last {num_steps} steps")
    for name, of_source in losses_by_source(entries).items():
        axes.plot(steps, moving_mean(of_source, num_steps), linewidth=0.8, label="source " + name.replace("$", r"\$"))
    if evaluations:
        points = [entry["step"] for entry in evaluations]
        axes.plot(points, values_of(evaluations, "loss"), "o-", color="C3", markersize=5, label="held out")
        scored = [entry for entry in evaluations if entry["score"] is not None]
        scores = [(entry["step"], entry["score"]) for entry in scored]
        for step, score in scores[:: -max(1, -(-len(scores) // MAX_SCORES))]:
            axes.annotate(f"{score:.0%}", (step, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top")
        if scores:
            axes.set_title(f"at the top: {scored[-1]['task']}", fontsize="medium", loc="left")
    if spans_a_decade([*losses, *values_of(evaluations, "loss")]):
        axes.set_yscale("log")
    axes.set_ylabel("loss, nats per trained token")
    axes.legend(frameon=False)


def draw_ranks(ranks: RankComparison, step: int, image: Path) -> None:
    """A heat map, phases by ranks: the colour is a time's ratio to its phase's median, the number milliseconds."""
    from matplotlib.figure import Figure

    phases = list(ranks.phases)
    seconds = [[figures.phase_seconds[phase] for figures in ranks.figures] for phase in phases]
    ratios = [[colour_of(value, median(row)) for value in row] for row in seconds]
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
                ink = "white" if abs(ratios[y][x] - 1.0) > 0.35 else "black"
                axes.text(x, y, f"{value * 1e3:,.0f}", ha="center", va="center", fontsize="small", color=ink)
    figure.colorbar(drawn, label="to the phase's median", extend="both")
    no_colour = f"within {SLOW_SECONDS * 1e3:.0f} ms of the median: no colour"
    axes.set_title(f"time by phase, ms, step {step}\n({no_colour})", fontsize="medium")
    _save(figure, image)


def values_of(entries: Entries, name: str) -> list[float]:
    """One number of every line; NaN, a gap in a curve, where it was not finite."""
    return [float("nan") if entry[name] is None else entry[name] for entry in entries]


def losses_by_source(entries: Entries) -> dict[str, list[float]]:
    """The loss of each source of a mixture in every line, NaN where it had none; of the MAX_SOURCES sources of which
    most tokens were trained."""
    tokens: Counter[str] = Counter()
    for entry in entries:
        tokens.update({name: source["trained_tokens"] for name, source in entry.get("sources", {}).items()})
    nothing = {"loss": None}
    found = {
        name: [entry.get("sources", {}).get(name, nothing) for entry in entries]
        for name, _ in tokens.most_common(MAX_SOURCES)
    }
    return {name: values_of(of_source, "loss") for name, of_source in found.items()}


def moving_mean(values: list[float], num_steps: int) -> list[float]:
    """Each value's mean with up to `num_steps` - 1 before it, of those that are numbers; NaN where none is."""
    kept: deque[float] = deque(maxlen=num_steps)
    means = []
    for value in values:
        kept.append(value)
        numbers = [one for one in kept if one == one]
        means.append(fsum(numbers) / len(numbers) if numbers else float("nan"))
    return means


def num_mean_steps(num_steps: int) -> int:
    """Steps in the mean that is shown of so many."""
    return max(MIN_MEAN_STEPS, round(MEAN_SHARE * num_steps))


def spans_a_decade(losses: list[float]) -> bool:
    """Whether the losses are positive and the largest is ten times the smallest, or more."""
    numbers = [loss for loss in losses if loss == loss]
    return bool(numbers) and min(numbers) > 0 and max(numbers) >= DECADE * min(numbers)


def colour_of(seconds: float, median_seconds: float) -> float:
    """A time's ratio to its phase's median; 1, which has no colour, where they differ by no more than noise."""
    return seconds / median_seconds if median_seconds and abs(seconds - median_seconds) > SLOW_SECONDS else 1.0


def _save(figure: "Figure", image: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    replace_file(image, content.getvalue())
