"""curves.png: loss, gradient norm and learning rates over the steps, drawn when the run saves and when it ends."""

from pathlib import Path

from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.jsonl import read_metrics


class CurvesHook(Hook):
    """Draws `image` from the lines of `metrics`."""

    def __init__(self, metrics: Path, image: Path) -> None:
        self.metrics, self.image = metrics, image

    def after_save(self, directory: Path, updates: int) -> None:
        draw_curves(self.metrics, self.image)

    def close(self) -> None:
        draw_curves(self.metrics, self.image)


def draw_curves(metrics: Path, image: Path) -> None:
    """Reads metrics.jsonl and writes a PNG with three panels; does nothing before the first step."""
    from matplotlib.figure import Figure

    entries = read_metrics(metrics)
    if not entries:
        return
    steps = [entry["step"] for entry in entries]
    figure = Figure(figsize=(9, 8), layout="constrained")
    loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    values = [entry["loss"] for entry in entries]
    loss.plot(steps, values, color="0.75", linewidth=0.8, label="step")
    loss.plot(steps, smooth(values), color="C0", label="moving mean")
    loss.set_ylabel("loss, nats per trained token")
    loss.legend(frameon=False)
    norm.plot(steps, [entry["grad_norm"] for entry in entries], color="C1", linewidth=0.8)
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    for component in entries[-1]["learning_rates"]:
        rate.plot(steps, [entry["learning_rates"].get(component) for entry in entries], label=component)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.legend(frameon=False)
    for axes in (loss, norm, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image, dpi=120)


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving mean, corrected for its start (as Adam's moments are)."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1.0 - weight) * value
        smoothed.append(mean / (1.0 - weight**count))
    return smoothed
