"""tools/bench.py kernels: a rehearsal on the CPU under Triton's interpreter, its table, its refusals."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlm.errors import ConfigError
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.ranks.tool_runs import tool, warm_tool
from tools.benchmarks.kernels import results
from tools.benchmarks.kernels.case import no_gradients
from tools.benchmarks.kernels.cases import CASES
from tools.benchmarks.kernels.cases_fp8 import TOLERANCE
from tools.benchmarks.kernels.cases_layers import NORM_CASE
from tools.benchmarks.kernels.command import chosen_cases
from tools.benchmarks.kernels.targets import TARGETS
from tools.benchmarks.kernels.timing import (
    COMPILED,
    Bench,
    Side,
    errors,
    is_ours,
    made_bytes,
    side_names,
    sides_of,
    times,
)  # fmt: skip
from tools.benchmarks.kernels.worker import Settings, Worker

TINY = Bench(torch.device("cpu"), torch.float32, rounds=2, tiny=True)
SIDES = {
    "attention": {"triton", "cpu", "reference"},
    "attention_into": {"triton", "calls"},
    "linear_cross_entropy": {"ours", "reference", "plain"},
    "space_to_depth_norm": {"triton", "torch", "reference"},
    "bias_gelu": {"triton", "torch", "reference"},
    "linear_rows_into": {"triton", "torch", "reference"},
    "downsample_projector": {"triton", "torch", "reference", "eager"},
    "prototype_extract": {"torch", "reference"},
    "frames_to_patches": {"triton", "reference"},
    "fp8_linear": {"triton", "reference", "torch", "gradients e5m2"},
    "fp8_quantise": {"triton", "reference"},
    "fp8_matmul": {"scaled_mm", "reference"},
    "norm": {"triton", "torch", "reference"},
    "activation": {"triton", "torch", "reference"},
    "rope": {"triton", "torch", "reference"},
}
QUICK = ("norm", "linear_cross_entropy", "linear_rows_into", "fp8_linear", "fp8_quantise")  # of the fast lane


@pytest.mark.parametrize("ops", [QUICK, pytest.param(tuple(SIDES), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_a_rehearsal(ops: tuple[str, ...], tmp_path: Path) -> None:
    """Every side but torch.compile, which takes long to compile."""
    files = [tmp_path / name for name in ("out.json", "out.png", "out.md")]
    done = tool("bench.py", "kernels", "--op", *ops, "--tiny", "--device", "cpu", "--rounds", "2", "--compile", "none",
                "--json", files[0], "--figure", files[1], "--markdown", files[2])  # fmt: skip
    assert (done.code, done.stderr) == (0, ""), done.stderr + done.stdout
    found = json.loads(files[0].read_text())
    assert {"date", "commit", "command", "machine", "versions"} <= found.keys() and not found["failures"]
    assert found["ceilings"].keys() == {"bytes_per_second", "flops_per_second"}
    for op in ops:
        assert {cell["side"] for cell in found["cells"] if cell["op"] == op} == SIDES[op]
    for cell in found["cells"]:
        assert cell["exact_enough"], cell
        assert cell["error"] < (TOLERANCE if cell["op"] == "fp8_linear" else 1e-5), cell
        assert all(len(cell[way]["all_seconds"]) == 2 for way in ("forward", "backward"))
        assert cell["forward"]["bytes"] > 0 and cell["peak_work_bytes"] is None
    assert {place.split()[0] for place in found["ratio"]} == {op for op in ops if "triton" in SIDES[op]}
    assert found["others"]["norm, liger"] == "not run: liger_kernel is not installed"
    assert files[1].stat().st_size > 10_000 and found["command"] in files[2].read_text()
    assert "tiny sizes: a rehearsal" in done.stdout
    assert [line["outcome"] for line in found["targets"]] == ["not measured"] * len(TARGETS)
    assert files[2].read_text().count("not measured: it is a GPU's, this is the CPU |") == len(TARGETS)


def test_the_cases_are_those_told_above() -> None:
    assert [case.op for case in CASES] == list(SIDES)


def test_what_there_is_not() -> None:
    done = warm_tool("bench.py", "kernels", "--op", "nrom")
    known = ", ".join(case.op for case in CASES)
    assert (done.code, done.stderr) == (1, f"error: --op: found 'nrom', needs one of {known}\n")
    with pytest.raises(ConfigError, match="--side: found .liger., needs one of reference, torch, torch.compile"):
        chosen_cases(argparse.Namespace(op=["rope"], side=["liger"]), CASES)


def test_every_operation_of_the_table_is_measured() -> None:
    from megatron_vlm.ops.table import TABLE

    measured = {id(case.operation) for case in CASES}
    assert {entry.name for entry in TABLE if id(entry.operation) not in measured} == set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_a_wrong_side_is_told(case) -> None:
    """Its error is larger than is allowed: a gradient, or where there is none a result, a hundredth too large, or an
    eighth where FP8 costs almost as much."""
    twin = "reference" if "reference" in side_names(case) else "calls"
    right = sides_of(case, [twin])[twin]
    excess = 0.01 if case.tolerance is None else 2 * case.tolerance
    forward_only = case.reference_backward is no_gradients

    def larger(outputs):
        first, *rest = outputs
        return ((first.float() * 2).to(first.dtype) if first.itemsize == 1 else first * (1 + excess), *rest)

    def spoiled(inputs, outputs, grads):
        return larger(right.backward(inputs, outputs, grads))

    wrong = Side(lambda inputs: larger(right.forward(inputs)), right.backward)
    found, reasons = errors(TINY, case, {twin: right, "wrong": wrong if forward_only else Side(right.forward, spoiled)})
    assert not reasons and found[twin]["exact_enough"] and not found["wrong"]["exact_enough"]
    if case.tolerance is None and case.op != "fp8_quantise":
        assert found["wrong"]["error"] == pytest.approx(excess, rel=0.01)


def test_what_is_allowed_is_of_several_draws() -> None:
    """Plain torch is exact in the first draw, by luck, and 1e-4 off in the others: a side may be 2e-4 off."""

    def draw(sizes, one):
        return {"x": one.normal(8), "luck": torch.tensor(1e-4 * (one.generator.initial_seed() > 0))}

    def plain(inputs):
        return (inputs["x"] * (1 + inputs["luck"]) if inputs["x"].dtype == torch.float32 else inputs["x"],)

    sides = {
        f"{off}": Side(lambda inputs, off=off: (inputs["x"] * (1 + off),), no_gradients) for off in (1.9e-4, 2.1e-4)
    }
    case = replace(NORM_CASE, draw=draw, reference=plain, reference_backward=no_gradients, trained=())
    found, _ = errors(TINY, case, sides)
    assert [cell["exact_enough"] for cell in found.values()] == [True, False]
    assert all(cell["plain_error"] == pytest.approx(1e-4, rel=0.01) for cell in found.values())


def test_a_side_is_measured_on_every_draw() -> None:
    """One that is right in the first draw alone is found out."""

    def draw(sizes, one):
        return {"x": one.normal(8), "later": torch.tensor(float(one.generator.initial_seed() > 0))}

    def wrong_later(inputs):
        return (inputs["x"] * (1 + 0.1 * inputs["later"]),)

    case = replace(
        NORM_CASE, draw=draw, reference=lambda inputs: (inputs["x"],), reference_backward=no_gradients, trained=()
    )
    sides = {"right": Side(case.reference, no_gradients), "wrong later": Side(wrong_later, no_gradients)}
    found, reasons = errors(TINY, case, sides)
    assert not reasons and [cell["exact_enough"] for cell in found.values()] == [True, False]
    assert found["wrong later"]["error"] == pytest.approx(0.1, rel=0.01)


def test_the_loss_is_measured_with_the_buffer_for_its_weights_gradient() -> None:
    """Ours adds to main_grad, which is there; the others' gradient is made, then added to .grad, which is there too."""
    sizes = {"tokens": 8, "hidden": 64, "vocabulary": 3000}
    (case,) = (case for case in CASES if case.op == "linear_cross_entropy")
    inputs = TINY.draw(case, sizes)
    (once,) = torch.autograd.grad(case.reference(inputs), inputs["weight"])
    for name, buffer in (("plain", "grad"), ("ours", "main_grad")):
        inputs, side = TINY.draw(case, sizes), sides_of(case, [name])[name]
        for number in (1, 2):
            with LiveBytes() as live:
                _, by_weight = side.backward(inputs, side.forward(inputs), (torch.ones(()),))
            torch.testing.assert_close(by_weight, number * once)
            assert by_weight is inputs[buffer] and (live.peak < once.nbytes) == (name == "ours"), name


def test_a_failing_side_stops_no_other() -> None:
    case = NORM_CASE
    sides = sides_of(case, ["torch"])

    def failing(inputs):
        raise RuntimeError("no such\n  instruction")

    cells, reasons = times(TINY, case, case.tiny[0], sides | {"reference": Side(failing, sides["torch"].backward)})
    assert cells.keys() == {"torch"} and reasons == {"reference": "failed: RuntimeError: no such instruction"}
    assert [name for name in side_names(case) if is_ours(case, name)] == ["triton", "torch", "reference"]
    assert COMPILED in side_names(case)


def test_the_interpreters_times_of_real_sizes_are_nobodys() -> None:
    case = NORM_CASE
    real = Bench(torch.device("cpu"), torch.float32, rounds=1, tiny=False)
    cells, reasons = times(real, case, case.tiny[0], sides_of(case, ["triton"]))
    assert not cells and reasons == {"triton": "not run: Triton's interpreter is for tests"}


def test_shares_follow_from_the_ceilings() -> None:
    """A pass of 100 bytes and 10 operations, where 10 bytes and 1 operation take a second, and of 300 operations."""
    ceilings = {"bytes_per_second": 10.0, "flops_per_second": 1.0}
    forward = {"bytes": 100, "flops": 9, "seconds": 20.0}
    backward = {"bytes": 100, "flops": 300, "seconds": 400.0}
    assert results.ceiling_seconds(forward, ceilings) == (10.0, False)
    assert results.ceiling_seconds(backward, ceilings) == (300.0, True)
    cell = {"op": "own", "sizes": {"tokens": 1}, "forward": forward, "backward": backward}
    assert results.share(cell, ceilings) == pytest.approx(310 / 420)
    slower = {**cell, "side": "torch", "forward": {**forward, "seconds": 230.0}}
    slowest = {**cell, "side": "reference", "forward": {**forward, "seconds": 900.0}}
    cells = [{**cell, "side": "triton"}, slower, slowest]
    assert results.ratios(cells) == {"own 1 tokens": pytest.approx(630 / 420)}
    assert results.ratios(cells[1:]) == {}


def test_memory_that_results_take() -> None:
    """Views of one memory count once, views of an input not at all."""
    x = torch.zeros(10)
    out = torch.zeros(4, 5)
    assert made_bytes((x[2:], out[0], out[1:], torch.zeros(3, dtype=torch.float64)), [x]) == 4 * 20 + 8 * 3


@pytest.mark.slow
def test_a_lost_process_costs_its_operation_only() -> None:
    """One that ends by itself (of an operation that there is not), one that is not done in time; then a new one."""
    worker = Worker(Settings("cpu", 1, tiny=True, compiles="none", sides=("reference",)))
    try:
        assert list(worker.measure("nrom", 200)) == [
            ("others", ("nrom", "failed: its process has ended with code 1")),
            ("failures", "nrom"),
        ]
        assert list(worker.measure("norm", 0.01)) == [
            ("others", ("norm", "failed: not done after 0 s")),
            ("failures", "norm"),
        ]
        ((name, cell),) = worker.measure("norm", 200)
        assert name == "cells" and cell["side"] == "reference" and cell["exact_enough"]
    finally:
        worker.stop()


@pytest.mark.slow
def test_the_time_of_a_run_can_end(tmp_path: Path) -> None:
    """What was not begun is said, and all files are written."""
    found = tmp_path / "out.json"
    done = tool("bench.py", "kernels", "--op", "norm", "rope", "--tiny", "--device", "cpu", "--seconds", "1",
                "--json", found)  # fmt: skip
    others = json.loads(found.read_text())["others"]
    assert done.code == 1 and others["rope"] == "not run: the time is over", done
