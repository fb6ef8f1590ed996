"""What rank 0 shows of a run: lines, TensorBoard events, drawings, the summary; across a resume and on a full disk."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vlm.config.schema import LoggingConfig
from megatron_vlm.errors import NotFiniteError, TrainingError
from megatron_vlm.planner.peak import Peak
from megatron_vlm.runtime import device
from megatron_vlm.runtime.device import shares_cores
from megatron_vlm.training import hooks
from megatron_vlm.training.hooks import curves, showing_hooks
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.console import ConsoleHook
from megatron_vlm.training.hooks.curves import (
    CurvesHook,
    colour_of,
    draw_curves,
    draw_ranks,
    moving_mean,
    num_mean_steps,
    spans_a_decade,
    values_of,
)
from megatron_vlm.training.hooks.files import AppendedFile, replace_file
from megatron_vlm.training.hooks.guard import FiniteGuard
from megatron_vlm.training.hooks.jsonl import EVALUATIONS, METRICS, JsonLinesHook, read_lines, to_line
from megatron_vlm.training.hooks.memory import MemoryHook
from megatron_vlm.training.hooks.summary import SummaryHook
from megatron_vlm.training.hooks.tensorboard import TensorBoardHook
from megatron_vlm.training.reporting.meters import SourceReport
from tests.helpers.ranks.solo import small_recipe
from tests.helpers.reports import comparison, evaluation_report, step_report

PEAK = Peak(1e12, "a device, bf16, measured")


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    first = JsonLinesHook(tmp_path, 0)
    for step in (1, 2, 3):
        first.after_step(step_report(step))
    for step in (2, 3):
        first.after_evaluation(evaluation_report(step))
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # cut short by a kill
    resumed = JsonLinesHook(tmp_path, 2)
    resumed.after_step(step_report(3, loss=2.0))
    resumed.after_evaluation(evaluation_report(3, loss=2.5))
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path / EVALUATIONS)] == [(2, 1.5), (3, 2.5)]


def test_a_fresh_run_starts_fresh_files(tmp_path: Path) -> None:
    for name in (METRICS, EVALUATIONS):
        (tmp_path / name).write_text('{"step": 1}\n')
    JsonLinesHook(tmp_path, 0).close()
    assert read_lines(tmp_path / METRICS) == read_lines(tmp_path / EVALUATIONS) == []


def test_a_line_has_what_a_reader_needs(tmp_path: Path) -> None:
    hook = JsonLinesHook(tmp_path, 0, sample_ids=True)
    ranks = comparison({"data": [0.0, 0.0], "encode": [0.1, 0.3], "exchange": [0.3, 0.3]}, [1000, 3000])
    hook.after_step(step_report(1, blanked={"missing": 2}, ranks=ranks))
    (line,) = read_lines(tmp_path / METRICS)  # before the close: nothing is held back
    hook.close()
    assert line["sample_ids"] == ["a", "b", "c", "d"] and line["blanked"] == {"missing": 2}
    assert line["ranks"]["phases"]["encode"] == {"mean": 0.2, "max": 0.3, "slowest_rank": 1}
    assert line["ranks"]["peak_memory_bytes"] == {"mean": 2000, "max": 3000, "fullest_rank": 1}
    assert line["ranks"]["straggler"]["rank"] == 1 and line["ranks"]["straggler"]["phase"] == "encode"
    other = JsonLinesHook(tmp_path, 0)
    other.after_step(step_report(1))
    other.close()
    assert not {"sample_ids", "ranks"} & set(read_lines(tmp_path / METRICS)[0])


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    hook = JsonLinesHook(tmp_path, 0)
    hook.after_step(step_report(1, loss=math.nan, grad_norm=math.inf, updated=False))
    hook.close()
    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["loss"] is None and line["grad_norm"] is None and line["updated"] is False
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()
    assert to_line({"evaluation": {"loss": math.nan}}) == b'{"evaluation": {"loss": null}}\n'


def test_a_step_that_trained_nothing_is_in_no_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its loss is null: no 0.0 in lines, curves, TensorBoard or the summary, and no gradient that was not finite."""
    nothing = {"loss": None, "grad_norm": None, "updated": False, "trained_tokens": 0, "blanked": {"damaged": 4}}
    lines, board = JsonLinesHook(tmp_path, 0), TensorBoardHook(tmp_path, 0)
    summary = SummaryHook(tmp_path / "summary.jsonl", 3, PEAK, {})
    console = ConsoleHook(3, 0, LoggingConfig(progress=True))
    reports = [step_report(1, loss=2.0), step_report(2, **nothing)]
    for report in [*reports, step_report(3, loss=1.0)]:
        for hook in (lines, board, summary, console):
            hook.after_step(report)
    for hook in (lines, board, console):
        hook.close()
    written = read_lines(tmp_path / METRICS)
    assert [line["loss"] for line in written] == [2.0, None, 1.0] and written[1]["updated"] is False
    assert scalars(tmp_path, "loss") == {1: 2.0, 3: 1.0} and scalars(tmp_path, "grad_norm").keys() == {1, 3}
    assert moving_mean(values_of(written, "loss"), 2)[1] == 2.0
    draw_curves(tmp_path)
    assert summary.summary(reports[1])["loss"] == 1.0


def test_a_run_that_ends_with_a_step_of_nothing_tells_the_loss_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = step_report(2, loss=None, grad_norm=None, updated=False, trained_tokens=0)
    console, summary = ConsoleHook(2, 0, LoggingConfig(progress=False)), SummaryHook(tmp_path / "s", 2, PEAK, {})
    with told(caplog):
        for report in (step_report(1, loss=2.5), nothing):
            console.after_step(report)
            summary.after_step(report)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["step 2: every sample was left out, so nothing was trained or updated"]
    assert summary.summary(nothing)["loss"] == 2.5
    console.close()


def test_an_evaluation_of_nothing_has_no_loss(tmp_path: Path) -> None:
    board, hook = TensorBoardHook(tmp_path, 0), JsonLinesHook(tmp_path, 0)
    for one in (board, hook, ConsoleHook(3, 0, LoggingConfig(progress=True))):
        one.after_step(step_report(1))
        one.after_evaluation(evaluation_report(1, loss=None))
        one.close()
    assert read_lines(tmp_path / EVALUATIONS)[0]["loss"] is None
    with pytest.raises(KeyError):
        scalars(tmp_path, "evaluation/loss")
    draw_curves(tmp_path)


def scalars(directory: Path, tag: str) -> dict[int, float]:
    """The values TensorBoard shows, by step."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_tensorboard_reads_the_events_back(tmp_path: Path) -> None:
    hook = TensorBoardHook(tmp_path, 0)
    for step in (1, 2, 3):
        hook.after_step(step_report(step, loss=float(step)))
    ranks = comparison({"data": [0.0, 0.0], "encode": [0.25, 0.75]}, [2**30, 2**31])
    hook.after_step(step_report(4, loss=4.0, ranks=ranks))
    hook.after_evaluation(evaluation_report(4, loss=1.5, score=0.5))
    assert scalars(tmp_path, "loss") == {1: 1, 2: 2, 3: 3, 4: 4}, "before the close: a kill loses nothing"
    assert scalars(tmp_path, "learning_rate/projector")[2] == pytest.approx(1e-2)
    wanted = {
        "grad_norm": 0.5, "speed/tokens_per_second": 200.0, "speed/mfu": 0.25, "speed/tflops_per_rank": 0.5,
        "memory/peak_gib": 1.0, "memory/peak_gib_of_ranks": 2.0, "seconds/encode": 0.5,
        "seconds_slowest/encode": 0.75, "evaluation/loss": 1.5, "evaluation/exact_match": 0.5,
    }  # fmt: skip
    assert {tag: scalars(tmp_path, tag)[4] for tag in wanted} == wanted
    hook.close()


def test_tensorboard_forgets_what_a_killed_run_had_done_since(tmp_path: Path) -> None:
    first = TensorBoardHook(tmp_path, 0)
    for step in range(1, 6):
        first.after_step(step_report(step, loss=1.0))
    resumed = TensorBoardHook(tmp_path, 3)
    resumed.after_step(step_report(4, loss=2.0))
    assert scalars(tmp_path, "loss") == {1: 1, 2: 1, 3: 1, 4: 2}
    first.close()
    resumed.close()


def run_of(hook: Hook, steps: int = 40) -> None:
    """A run with evaluations, a slow rank and a save at its end."""
    for step in range(1, steps + 1):
        seconds = {"data": [0.001] * 4, "encode": [0.02, 0.02, 0.09, 0.02], "exchange": [0.09] * 4}
        seconds |= {"pipeline": [0.2, 0.21, 0.19, 0.2], "encoder_backward": [0.04] * 4, "update": [0.01] * 4}
        ranks = comparison(seconds) if step % 10 == 0 else None
        loss = 3.0 / step + 0.1 * math.sin(step)
        hook.after_step(step_report(step, loss=loss, tokens_per_second=200 + 10 * math.cos(step), ranks=ranks))
        if step % 10 == 0:
            hook.after_evaluation(evaluation_report(step, 3.2 / step, step / 50))
    hook.close()


def test_curves_and_ranks_are_drawn(tmp_path: Path) -> None:
    run_of(JsonLinesHook(tmp_path, 0))
    run_of(CurvesHook(tmp_path))
    for name in ("curves.png", "ranks_phases.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 24) or []) > 10
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_no_drawing_before_the_first_step(tmp_path: Path) -> None:
    CurvesHook(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_the_mean_is_of_the_last_steps_that_have_a_number() -> None:
    assert moving_mean([2.0] * 5, 3) == [2.0] * 5
    assert moving_mean([2.0, math.nan, 4.0, 9.0], 3) == pytest.approx([2.0, 2.0, 3.0, 6.5])
    assert math.isnan(moving_mean([math.nan], 3)[0])
    assert num_mean_steps(5) == 10 and num_mean_steps(1000) == 50


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([9.0, 1.0], False), ([10.0, 1.0], True), ([10.0, math.nan, 0.5], True), ([1.0, 0.0], False), ([math.nan], False)],
)
def test_a_loss_that_spans_a_decade_has_a_logarithmic_axis(losses: list[float], expected: bool) -> None:
    assert spans_a_decade(losses) is expected


def test_times_that_differ_by_noise_have_no_colour() -> None:
    assert colour_of(0.0004, 0.0001) == 1.0 and colour_of(0.105, 0.1) == 1.0
    assert colour_of(0.2, 0.1) == 2.0 and colour_of(0.05, 0.1) == 0.5


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is drawn, instead of files."""
    drawn: list[Any] = []
    monkeypatch.setattr(curves, "_save", lambda figure, image: drawn.append(figure))
    return drawn


@pytest.mark.parametrize(("last", "scale"), [(0.3, "log"), (0.5, "linear")])
def test_the_drawn_loss_has_its_axis_and_its_mean(tmp_path: Path, figures: list[Any], last: float, scale: str) -> None:
    lines, losses = JsonLinesHook(tmp_path, 0), [4.0 - n for n in range(3)] + [last] * 12
    for step, loss in enumerate(losses, start=1):
        lines.after_step(step_report(step, loss=loss))
    lines.close()
    draw_curves(tmp_path)
    axes = figures[0].axes[0]
    assert axes.get_yscale() == scale and axes.get_ylabel() == "loss, nats per trained token"
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert shown["step"] == losses
    means = [sum(losses[max(0, n - 9) : n + 1]) / min(10, n + 1) for n in range(15)]
    assert shown["mean of the last 10 steps"] == pytest.approx(means)


def test_the_drawn_ranks_have_a_colour_where_they_differ(figures: list[Any], tmp_path: Path) -> None:
    phases = {"data": [0.0001, 0.0009, 0.0001], "encode": [0.1, 0.3, 0.1]}
    draw_ranks(comparison(phases), 7, tmp_path / "ranks.png")
    ((data, encode),) = (image.get_array().tolist() for image in figures[0].axes[0].images)
    assert data == [1.0] * 3 and encode == pytest.approx([1.0, 3.0, 1.0])


def test_the_curves_appear_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(curves.time, "monotonic", lambda: now[0])
    lines, hook = JsonLinesHook(tmp_path, 0), CurvesHook(tmp_path)
    for step, seconds in enumerate((1.0, 20.0, curves.DRAWING_SECONDS), start=1):
        now[0] = seconds
        lines.after_step(step_report(step))
        hook.after_step(step_report(step))
        assert (tmp_path / "curves.png").exists() is (step == 3)
    assert hook.due == 2 * curves.DRAWING_SECONDS


def test_drawing_costs_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def slowly(directory: Path) -> None:
        now[0] += 3.0

    monkeypatch.setattr(curves.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(curves, "draw_curves", slowly)
    hook = CurvesHook(tmp_path)
    now[0] = hook.due
    hook.after_step(step_report(1))
    assert hook.due == pytest.approx(now[0] + 3.0 / curves.DRAWING_SHARE)


def test_the_summary_adds_up_each_attempt(tmp_path: Path) -> None:
    path = tmp_path / "summary.jsonl"
    for first_step in (1, 3):
        hook = SummaryHook(path, 10, PEAK, {"too long": 5})
        for step in (first_step, first_step + 1):
            hook.after_step(step_report(step, blanked={"missing": step}, seconds=0.1 * step, mfu=0.1 * step))
        hook.after_step(step_report(first_step + 2, updated=False, loss=0.5, seconds=1.0, mfu=0.0))
        hook.after_evaluation(evaluation_report(first_step + 2))
        hook.close()
    first, last = read_lines(path)
    assert (first["step"], last["step"], last["of_steps"], last["steps"]) == (3, 5, 10, 3)
    assert last["samples_blanked"] == {"missing": 7} and last["samples_left_out"] == {"too long": 5}
    assert last["tokens"] == 60 and last["samples"] == 12 and last["updates_left_out"] == 1
    assert last["seconds"] == pytest.approx(1.7) and last["tokens_per_second"] == pytest.approx(60 / 1.7)
    assert last["mfu"] == pytest.approx((0.3 * 0.3 + 0.4 * 0.4) / 1.7)
    assert last["loss"] == 0.5 and last["evaluation"]["loss"] == 1.5 and last["peak_flops_source"] == PEAK.source


def of_sources(**losses: float | None) -> dict[str, SourceReport]:
    return {name: SourceReport(2, 10, 0 if loss is None else 5, loss) for name, loss in losses.items()}


def test_sources_of_a_mixture_are_drawn_and_summed_up(
    tmp_path: Path, figures: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each loss by its trained tokens; a step without some of a source is a gap."""
    steps = [of_sources(a=3.0, b=1.0), of_sources(a=None, b=2.0), of_sources(a=1.0, b=None)]
    lines, summary = JsonLinesHook(tmp_path, 0), SummaryHook(tmp_path / "summary.jsonl", 3, PEAK, {})
    with told(caplog):
        for number, sources in enumerate(steps, start=1):
            for hook in (lines, summary):
                hook.after_step(step_report(number, sources=sources))
        lines.close()
        summary.close()
    draw_curves(tmp_path)
    shown = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].get_lines()}
    assert shown["source a"] == [3.0, 3.0, 2.0] and shown["source b"] == [1.0, 1.5, 1.5]
    (line,) = read_lines(tmp_path / "summary.jsonl")
    assert line["sources"]["a"] == {"samples": 6, "tokens": 30, "trained_tokens": 10, "loss": 2.0}
    assert "source b: 6 samples, 30 tokens (50.0% of all), loss 1.5000" in caplog.text
    many = {f"s{number}": SourceReport(1, number, number, 1.0) for number in range(15)}
    shown_sources = curves.losses_by_source([{"sources": {name: vars(one) for name, one in many.items()}}, {}])
    assert list(shown_sources) == [f"s{number}" for number in range(14, 4, -1)]
    assert shown_sources["s14"][0] == 1.0 and math.isnan(shown_sources["s14"][1])


def test_the_summary_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with told(caplog):
        hook = SummaryHook(tmp_path / "summary.jsonl", 10, PEAK, {"too long": 5, "bomb": 1})
        hook.after_step(step_report(1, blanked={"missing": 2}))
        hook.close()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "left out while indexing: 1 bomb, 5 too long" in text and "left untrained: 2 missing" in text
    assert "200 tokens/s" in text and "MFU 25.0%" in text and "measured" in text


def test_a_run_without_a_step_has_no_summary(tmp_path: Path) -> None:
    SummaryHook(tmp_path / "summary.jsonl", 10, PEAK, {}).close()
    assert not (tmp_path / "summary.jsonl").exists()


STRAGGLER = {"data": [0.0] * 3, "encode": [0.1, 0.3, 0.1]}
NONE = {"data": [0.0] * 3, "encode": [0.1] * 3}
OTHER = {"data": [0.0] * 3, "encode": [0.3, 0.1, 0.1]}


@pytest.mark.parametrize(
    ("compared", "steps_told"),
    [
        ([STRAGGLER] * 2, []),  # it may have been noise
        ([STRAGGLER] * 7, [3]),
        ([STRAGGLER, STRAGGLER, NONE, STRAGGLER, STRAGGLER], []),
        ([STRAGGLER, STRAGGLER, OTHER, STRAGGLER, STRAGGLER], []),
        ([STRAGGLER] * 3 + [NONE] + [STRAGGLER] * 3, [3, 7]),
        ([NONE] * 4, []),
    ],
)
def test_a_rank_that_stays_behind_is_told_in_one_line(
    caplog: pytest.LogCaptureFixture, compared: list[dict[str, list[float]]], steps_told: list[int]
) -> None:
    hook = ConsoleHook(10, 0, LoggingConfig(progress=False))
    with told(caplog):
        for step, seconds in enumerate(compared, start=1):
            hook.after_step(step_report(step, ranks=comparison(seconds)))
            hook.after_step(step_report(step))  # which is not compared, and breaks no series
    messages = [record.getMessage() for record in caplog.records]
    assert [int(message.split()[1]) for message in messages] == steps_told
    assert all("rank 1" in message and "encode took 300 ms" in message for message in messages)
    hook.close()


def test_no_rank_is_told_where_ranks_share_cores(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(device, "current_device", lambda: torch.device("cpu"))
    assert shares_cores(2 // torch.get_num_threads() + 1) and not shares_cores(1)
    hook = ConsoleHook(10, 0, LoggingConfig(progress=False), judges_ranks=False)
    with told(caplog):
        for step in range(1, 6):
            hook.after_step(step_report(step, ranks=comparison(STRAGGLER)))
    assert not caplog.records


@pytest.mark.parametrize("shares", [True, False])
def test_a_run_judges_its_ranks_where_each_has_cores_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, shares: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(hooks, "shares_cores", lambda num_ranks: bool(asked.append(num_ranks)) or shares)
    sections = {
        "checkpoint": {"directory": str(tmp_path)},
        "logging": {"tensorboard": False, "curves": False, "progress": False},
    }
    job = SimpleNamespace(
        config=small_recipe(sections=sections), data=None, ranks_per_node=5, start_step=0, grid=SimpleNamespace(rank=0)
    )
    shown = [hook for hook in hooks.build_hooks(job, PEAK) if not isinstance(hook, MemoryHook)]
    assert asked == [5]
    with told(caplog):
        for step in range(1, 4):
            for hook in shown:
                hook.after_step(step_report(step, ranks=comparison(STRAGGLER)))
    assert any("holds the others up" in record.getMessage() for record in caplog.records) is not shares
    for hook in shown:
        hook.close()


def test_the_guard_counts_no_step_that_trained_nothing() -> None:
    """Neither as an update left out nor as the end of a series of these."""
    training = {"training": {"steps": 9, "sequence_length": 64, "max_nonfinite_steps": 2}}
    guard = FiniteGuard(SimpleNamespace(config=small_recipe(sections=training)))
    nothing = {"loss": None, "grad_norm": None, "updated": False, "trained_tokens": 0}
    for step in range(1, 5):
        guard.after_step(step_report(step, **nothing))
    guard.after_step(step_report(5, updated=False))
    guard.after_step(step_report(6, **nothing))
    with pytest.raises(NotFiniteError, match="after step 7: .* 2 updates in a row were left out"):
        guard.after_step(step_report(7, updated=False))


@contextlib.contextmanager
def told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Lets caplog see the package's log, which does not go to the root logger."""
    logger = logging.getLogger("megatron_vlm")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)


def test_a_full_disk_is_told_in_one_line() -> None:
    file = AppendedFile(Path("/dev/full"))
    with pytest.raises(TrainingError, match="/dev/full cannot be written: No space left on device"):
        file.write(b"a line\n")
    file.close()


def test_a_replaced_file_is_whole_or_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    path.with_name(".file.partial").mkdir()
    with pytest.raises(TrainingError, match="file cannot be written"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_an_evaluation_shows_no_progress_of_training(tmp_path: Path) -> None:
    """It makes no step, and one of epochs does not know how many there are."""
    training = {"mode": "eval", "steps": None, "epochs": 2.0}
    sections = {"checkpoint": {"directory": str(tmp_path)}, "training": training, "evaluation": {"path": "a.json"}}
    (console,) = (
        hook for hook in showing_hooks(small_recipe(sections=sections), 6, PEAK, {}) if isinstance(hook, ConsoleHook)
    )
    assert not console.bar.enabled


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_recipe_chooses_what_is_shown(tmp_path: Path, tensorboard: bool) -> None:
    sections = {
        "checkpoint": {"directory": str(tmp_path / "run")},
        "logging": {"tensorboard": tensorboard, "curves": False, "progress": False, "sample_ids": True},
    }
    hooks = showing_hooks(small_recipe(sections=sections), 0, PEAK, {})
    for hook in hooks:
        hook.after_step(step_report(1))
    for hook in hooks:
        hook.close()
    assert (tmp_path / "run" / "tensorboard").exists() is tensorboard
    assert not (tmp_path / "run" / "curves.png").exists()
    assert read_lines(tmp_path / "run" / METRICS)[0]["sample_ids"]
    assert (tmp_path / "run" / "recipe.yaml").exists() and (tmp_path / "run" / "summary.jsonl").exists()


def test_a_pipe_in_the_place_of_the_lines_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be read: is a named pipe"):
        JsonLinesHook(tmp_path, 3)
