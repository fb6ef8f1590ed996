"""tools/bench.py kernels: a rehearsal on the CPU under Triton's interpreter, its table, its refusals."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from megatron_vlm.errors import ConfigError
from tests.system.test_tools import tool
from tools.benchmarks import kernel_report
from tools.benchmarks.kernel_cases import CASES
from tools.benchmarks.kernel_timing import COMPILED, Bench, Side, errors, is_ours, side_names, sides_of, times
from tools.benchmarks.kernels import chosen_cases

TINY = Bench(torch.device("cpu"), torch.float32, rounds=2, tiny=True)
LAYER_OPS = ("norm", "activation", "rope")


def test_a_rehearsal(tmp_path: Path) -> None:
    """Every operation, every side but torch.compile, which takes long to compile."""
    files = [tmp_path / name for name in ("out.json", "out.png", "out.md")]
    done = tool("bench.py", "kernels", "--tiny", "--device", "cpu", "--rounds", "2", "--compile", "none",
                "--json", files[0], "--figure", files[1], "--markdown", files[2])  # fmt: skip
    assert (done.code, done.stderr) == (0, ""), done.stderr + done.stdout
    found = json.loads(files[0].read_text())
    assert {"date", "commit", "command", "machine", "versions"} <= found.keys() and not found["failures"]
    assert found["ceilings"].keys() == {"bytes_per_second", "flops_per_second"}
    sides = {
        op: {cell["side"] for cell in found["cells"] if cell["op"] == op} for op in {c["op"] for c in found["cells"]}
    }
    assert all(sides[op] >= {"triton", "torch", "reference"} for op in LAYER_OPS)
    assert sides["attention"] >= {"cpu", "reference"} and sides["linear_cross_entropy"] >= {"ours", "reference"}
    for cell in found["cells"]:
        assert cell["exact_enough"] and cell["error"] < 1e-5, cell
        assert all(len(cell[way]["all_seconds"]) == 2 and cell[way]["bytes"] > 0 for way in ("forward", "backward"))
    assert {place.split()[0] for place in found["ratio"]} >= set(LAYER_OPS)
    assert found["others"]["norm, liger"] == "not run: liger_kernel is not installed"
    assert files[1].stat().st_size > 10_000 and found["command"] in files[2].read_text()
    assert "tiny sizes: a rehearsal" in done.stdout


def test_what_there_is_not() -> None:
    done = tool("bench.py", "kernels", "--op", "nrom")
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
    """Its error is larger than twice plain torch's: a gradient a hundredth too large."""
    twin = "reference"
    right = sides_of(case, [twin])[twin]

    def spoiled(inputs, outputs, grads):
        first, *rest = right.backward(inputs, outputs, grads)
        return (first * 1.01, *rest)

    found, reasons = errors(TINY, case, {twin: right, "wrong": Side(right.forward, spoiled)})
    assert not reasons and found[twin]["exact_enough"] and not found["wrong"]["exact_enough"]
    assert found["wrong"]["error"] == pytest.approx(0.01, rel=0.01)


def test_a_failing_side_stops_no_other() -> None:
    case = CASES[0]
    sides = sides_of(case, ["torch"])

    def failing(inputs):
        raise RuntimeError("no such\n  instruction")

    cells, reasons = times(TINY, case, case.tiny[0], sides | {"reference": Side(failing, sides["torch"].backward)})
    assert cells.keys() == {"torch"} and reasons == {"reference": "failed: RuntimeError: no such instruction"}
    assert [name for name in side_names(case) if is_ours(case, name)] == ["triton", "torch", "reference"]
    assert COMPILED in side_names(case)


def test_the_interpreters_times_of_real_sizes_are_nobodys() -> None:
    case = CASES[0]
    real = Bench(torch.device("cpu"), torch.float32, rounds=1, tiny=False)
    cells, reasons = times(real, case, case.tiny[0], sides_of(case, ["triton"]))
    assert not cells and reasons == {"triton": "not run: Triton's interpreter is for tests"}


def test_shares_follow_from_the_ceilings() -> None:
    """A pass of 100 bytes and 10 operations, where 10 bytes and 1 operation take a second, and of 300 operations."""
    ceilings = {"bytes_per_second": 10.0, "flops_per_second": 1.0}
    forward = {"bytes": 100, "flops": 9, "seconds": 20.0}
    backward = {"bytes": 100, "flops": 300, "seconds": 400.0}
    assert kernel_report.ceiling_seconds(forward, ceilings) == (10.0, False)
    assert kernel_report.ceiling_seconds(backward, ceilings) == (300.0, True)
    cell = {"op": "own", "sizes": {"tokens": 1}, "forward": forward, "backward": backward}
    assert kernel_report.share(cell, ceilings) == pytest.approx(310 / 420)
    slower = {**cell, "side": "torch", "forward": {**forward, "seconds": 230.0}}
    slowest = {**cell, "side": "reference", "forward": {**forward, "seconds": 900.0}}
    cells = [{**cell, "side": "triton"}, slower, slowest]
    assert kernel_report.ratios(cells) == {"own 1 tokens": pytest.approx(630 / 420)}
    assert kernel_report.ratios(cells[1:]) == {}
