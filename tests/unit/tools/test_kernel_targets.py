"""What the kernel benchmark says of the targets, on made-up numbers: held, missed, not measured."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tools.benchmarks.kernels import targets
from tools.benchmarks.kernels.cases import CASES
from tools.benchmarks.kernels.targets import (
    FRONT,
    LENGTHS,
    LINEARS,
    LOSS,
    PROJECTOR,
    PROTOTYPES,
    ROW,
    TARGETS,
    NotMeasuredError,
    Run,
    step_lines,
    words,
)  # fmt: skip
from tools.benchmarks.kernels.timing import side_names


def cell(op: str, sizes: dict[str, int], side: str, seconds: float, peak: int | None = 100) -> dict[str, Any]:
    """A third of the time forward; 300 bytes in all."""
    ways = {"forward": {"seconds": seconds / 3, "bytes": 100}, "backward": {"seconds": 2 * seconds / 3, "bytes": 200}}
    return {"op": op, "sizes": sizes, "side": side, "peak_extra_bytes": peak, "peak_work_bytes": peak, **ways}


def made_up() -> dict[str, Any]:
    """A run that measured everything that a target needs."""
    cells = []
    for length in LENGTHS:
        row = {"positions": length, **ROW}
        cells += [cell("attention", row, "triton", 4.0), cell("attention", row, "cudnn", 3.0)]
        cells += [cell("attention_into", row, "triton", 2.0), cell("attention_into", row, "calls", 2.3)]
    all_logits = LOSS["tokens"] * LOSS["vocabulary"] * 2
    for tokens in (8192, 32768):
        loss = {**LOSS, "tokens": tokens}
        cells += [cell("linear_cross_entropy", loss, "ours", 1.1, all_logits // 20)]
        cells += [cell("linear_cross_entropy", loss, "plain", 1.0, all_logits * 3)]
    for side, seconds in (("triton", 1.0), ("torch", 2.5), ("torch.compile", 1.2)):
        cells.append(cell("space_to_depth_norm", FRONT, side, seconds))
    cells += [cell("downsample_projector", PROJECTOR, "triton", 1.0, 50)]
    cells += [cell("downsample_projector", PROJECTOR, "eager", 1.0, 100)]
    cells += [cell("prototype_extract", PROTOTYPES, "torch", 1.0, 10)]
    cells += [cell("prototype_extract", PROTOTYPES, "reference", 6.0, 100)]
    for number, linear in enumerate(LINEARS):
        cells += [cell("fp8_linear", linear, "torch", 1.0), cell("fp8_linear", linear, "triton", 0.25 * number + 0.25)]
    return {
        "machine": {"device": "NVIDIA H200"},
        "dtype": "bfloat16",
        "ceilings": {"bytes_per_second": 400.0, "flops_per_second": 1.0},
        "cells": cells,
        "others": {},
    }


def outcomes(result: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    return {line["target"]: (line["found"], line["outcome"]) for line in targets.report(result)}


def test_the_arithmetic() -> None:
    found = list(outcomes(made_up()).values())
    assert found[:3] == [(0.75, "held")] * 3
    assert found[3:6] == [(pytest.approx(1.15), "held")] * 3
    assert found[6:8] == [(pytest.approx(1.1), "held"), (pytest.approx(1.1), "missed")]  # up to 1.15, up to 1.0
    assert found[8:12] == [
        (pytest.approx(0.05), "held"),
        (2.5, "held"),
        (1.2, "missed"),
        (0.75, "held"),
    ]  # 300 bytes a second of 400
    assert found[12:16] == [(0.5, "held"), (6.0, "held"), (0.1, "missed"), (pytest.approx(4 / 2.5), "held")]
    assert found[16:] == [(None, "not measured")] * 2
    last = targets.report(made_up())[-2]
    assert "not measured by this command" in words(last)


def test_what_is_missing_is_said_with_its_reason() -> None:
    result = made_up()
    result["cells"] = [one for one in result["cells"] if one["side"] not in ("cudnn", "torch.compile", "plain")]
    result["cells"] = [one for one in result["cells"] if one["sizes"] not in (PROTOTYPES, LINEARS[2])]
    result["others"] = {
        "attention, cudnn": "not run: it needs tensors on a CUDA device",
        "linear_cross_entropy 32768 tokens, 4096 hidden, 131072 vocabulary, plain": "out of memory",
        "prototype_extract": "failed: not done after 150 s",
    }
    reasons = {line["target"]: line["reason"] for line in targets.report(result)}
    told = list(reasons.values())
    assert told[:3] == ["not run: it needs tensors on a CUDA device"] * 3 and told[3:6] == [None] * 3
    assert told[6:8] == ["no time of linear_cross_entropy, plain", "out of memory"]
    assert told[10] == "no time of space_to_depth_norm, torch.compile"
    assert told[13:15] == ["failed: not done after 150 s"] * 2
    assert told[15] == "no time of fp8_linear, torch"  # one of the four layers: no sum of the others


def test_no_target_is_the_cpu_s_and_no_memory_is_made_up() -> None:
    result = made_up()
    for one in result["cells"]:
        one["peak_extra_bytes"] = one["peak_work_bytes"] = None
    lines = targets.report(result)
    assert [line["reason"] for line in lines if "peak memory" in line["target"]] == [
        "peak memory is known on CUDA only"
    ] * 3
    result["machine"]["device"] = "CPU"
    assert {line["outcome"] for line in targets.report(result)} == {"not measured"}


def test_what_a_target_names_is_measured() -> None:
    """Its operation, sizes and sides are among those of the cases."""
    asked: list[tuple[str, Any, str]] = []

    class Asked(Run):
        def cell(self, op: str, sizes: Any, side: str) -> dict[str, Any]:
            asked.append((op, sizes, side))
            return super().cell(op, sizes, side)

    for target in TARGETS[:-2]:
        target.measure(Asked(made_up()))
    known = {case.op: case for case in CASES}
    for op, sizes, side in asked:
        assert side in side_names(known[op]), (op, side)
        assert any(sizes.items() <= one.items() for one in known[op].sizes), (op, sizes)
    assert len({op for op, _, _ in asked}) == 7
    with pytest.raises(NotMeasuredError, match="no time of norm, triton"):
        Run(made_up()).cell("norm", {"tokens": 1}, "triton")


def test_the_whole_step(tmp_path: Path) -> None:
    """79 of 100 FLOP/s is the rate; in FP8 less than 1.25 times as fast."""
    assert all("not measured" in line for line in step_lines(tmp_path))
    kernels = {"ceilings": {"flops_per_second": 100.0}}
    step = {"machine": {"device": "NVIDIA H200"}, "sides": {"megatron_vlm": {}}}
    step["sides"]["megatron_vlm"] = {"model_flops_per_second": 50.0, "tokens_per_second": 10.0}
    (tmp_path / "step_gpu.json").write_text(json.dumps(step))
    first, second = step_lines(tmp_path)
    assert first.endswith("not measured: there is no kernels_gpu.json")
    assert second.endswith("not measured: there is no step_fp8_gpu.json")
    (tmp_path / "kernels_gpu.json").write_text(json.dumps(kernels))
    faster = copy.deepcopy(step)
    faster["sides"]["megatron_vlm"]["tokens_per_second"] = 12.0
    (tmp_path / "step_fp8_gpu.json").write_text(json.dumps(faster))
    first, second = step_lines(tmp_path)
    assert first.endswith("0.5, needed at least 0.45: held") and second.endswith("1.2, needed at least 1.25: missed")
