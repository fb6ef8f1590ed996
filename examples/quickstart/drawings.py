"""The two drawings of the quickstart: the loss over both phases, and a contact sheet of held-out questions."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

Record = dict[str, Any]  # one line of evaluation's exact_match.jsonl
RIGHT, WRONG = "#1a7f37", "#c0261c"
NUM_COLUMNS = 8
GAP_PIXELS = 4  # between the two images of a pair
CAPTION_CHARACTERS = 26  # a line
MEAN_STEPS = 20


def draw_loss(phases: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Loss per step, the phases one after the other.

    Args:
        phases: by name, the lines of each one's metrics.jsonl.
        path: of the PNG.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    start = 0
    for number, (name, entries) in enumerate(phases.items()):
        steps = [start + entry["step"] for entry in entries]
        losses = [entry["loss"] for entry in entries]
        axes.plot(steps, losses, color=f"C{number}", alpha=0.3, linewidth=0.8)
        axes.plot(steps, moving_mean(losses), color=f"C{number}", label=f"{name}: {len(entries)} steps")
        start = steps[-1]
    axes.set(xlabel="step", ylabel="loss, nats per trained token", yscale="log", title="Quickstart: training loss")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def moving_mean(values: Sequence[float]) -> np.ndarray:
    """Each value's mean with up to MEAN_STEPS - 1 before it."""
    sums = np.cumsum([0.0, *values])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - MEAN_STEPS, 0)
    return (sums[last] - sums[first]) / (last - first)


def draw_contact_sheet(records: Sequence[Record], data: Path, path: Path) -> None:
    """Held-out images with question, answer and truth: a row of each form, good and bad, then a row of wrong answers.

    Args:
        records: of the evaluation, in file order.
        data: folder of the images.
        path: of the PNG.
    """
    rows: dict[str, list[Record]] = {}
    for number, (form, of_form) in enumerate(_by_form(records).items()):
        start = number * NUM_COLUMNS  # other images than in the form before
        rows[f"{form}: {NUM_COLUMNS} of {len(of_form)}, {_share(of_form)} right"] = of_form[start : start + NUM_COLUMNS]
    wrong = [record for record in records if not record["score"]]
    if wrong:
        by_turns = [record for turn in zip_longest(*_by_form(wrong).values()) for record in turn if record]
        rows[f"wrong: {min(len(wrong), NUM_COLUMNS)} of {len(wrong)}"] = by_turns[:NUM_COLUMNS]
    figure = Figure(figsize=(2.0 * NUM_COLUMNS, 3.3 * len(rows)), layout="constrained")
    for part, (title, shown) in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontweight="bold")
        for axes, record in zip(part.subplots(1, NUM_COLUMNS), [*shown, *[None] * NUM_COLUMNS], strict=False):
            _draw_record(axes, record, data)
    figure.savefig(path, dpi=110)


def _draw_record(axes: Axes, record: Record | None, data: Path) -> None:
    axes.set(xticks=[], yticks=[])
    if record is None:
        axes.set_axis_off()
        return
    colour = RIGHT if record["score"] else WRONG
    axes.imshow(_side_by_side([data / name for name in record["images"]]))
    axes.spines[:].set(color=colour, linewidth=1 if record["score"] else 3)
    question = textwrap.fill(record["question"].replace("<image>", "").strip(), CAPTION_CHARACTERS)
    axes.set_title(question, fontsize=8)
    answer = record["answer"] or "(nothing)"
    verdict = f"answer: {answer}\ntruth: {record['truth']}"
    axes.set_xlabel(verdict if record["score"] else f"WRONG\n{verdict}", fontsize=8, color=colour)


def _side_by_side(paths: Sequence[Path]) -> np.ndarray:
    """Images of one height -> [H, W, 3] with a white gap between them."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    gap = np.full((images[0].shape[0], GAP_PIXELS, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def _by_form(records: Sequence[Record]) -> dict[str, list[Record]]:
    forms: dict[str, list[Record]] = {}
    for record in records:
        forms.setdefault(record["form"], []).append(record)
    return forms


def _share(records: Sequence[Record]) -> str:
    return f"{sum(record['score'] for record in records) / len(records):.1%}"
