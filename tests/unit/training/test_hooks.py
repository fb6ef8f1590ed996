"""metrics.jsonl across a resume, and the curves drawn from it."""

import json
from pathlib import Path

from PIL import Image

from megatron_vlm.training.hooks.curves import draw_curves, smooth
from megatron_vlm.training.hooks.jsonl import JsonLinesHook, read_metrics
from megatron_vlm.training.meters import StepReport


def report(step: int, loss: float = 1.0) -> StepReport:
    rates = {"language": 1e-3, "projector": 1e-2}
    return StepReport(step, loss, 0.5, rates, 10, 20, 3, 0.1, True)


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesHook(path, 0)
    for step in (1, 2, 3):
        first.after_step(report(step))
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # cut short by a kill
    resumed = JsonLinesHook(path, 2)
    resumed.after_step(report(3, loss=2.0))
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(report(1).as_dict()) + "\n")
    JsonLinesHook(path, 0).close()
    assert read_metrics(path) == []


def test_curves_are_a_picture(tmp_path: Path) -> None:
    hook = JsonLinesHook(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 30):
        hook.after_step(report(step, loss=3.0 / step))
    hook.close()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_no_picture_before_the_first_step(tmp_path: Path) -> None:
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_the_moving_mean_of_a_constant_is_that_constant() -> None:
    assert all(abs(value - 2.0) < 1e-12 for value in smooth([2.0] * 5))
