"""The project's targets for its kernels, and what a run of `tools/bench.py kernels` says of each.

A target is a ratio of two numbers that one run measured on one GPU, and the bound it has to keep. Where a number is
missing the target is "not measured", with the reason that the run gave; nothing is filled in from elsewhere. All times
are forward and backward together, in the inputs' dtype, bf16.

`python -m tools.benchmarks.kernels.targets FOLDER` says what the GPU suite's files in FOLDER hold of the whole step.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = ("forward", "backward")
HELD, MISSED, NOT_MEASURED = "held", "missed", "not measured"
STEP_SHARE, STEP_FP8 = 0.45, 1.25
ELSEWHERE = "not measured by this command: examples/gpu_suite.sh has the stages step and step_fp8"
TRITON, COMPILED = "triton", "torch.compile"
Sizes = Mapping[str, int]
Cell = dict[str, Any]


class NotMeasuredError(Exception):
    """A number that a target needs is not there; the message says why."""


@dataclass(frozen=True)
class Run:
    """Measurements of a run: `result` as the benchmark writes it."""

    result: Mapping[str, Any]

    def cell(self, op: str, sizes: Sizes, side: str) -> Cell:
        """Cell of an operation at sizes, which may name fewer numbers than the benchmark's."""
        cells = [
            cell
            for cell in self.result["cells"]
            if cell["op"] == op and cell["side"] == side and sizes.items() <= cell["sizes"].items()
        ]
        if cells:
            found: Cell = cells[0]
            return found
        others = self.result["others"]
        reasons = [others[place] for place in others if _tells_of(place, op, sizes, side)]
        raise NotMeasuredError(reasons[0] if reasons else f"no time of {op}, {side}")

    def seconds(self, op: str, sizes: Sizes, side: str) -> float:
        """Forward and backward."""
        cell = self.cell(op, sizes, side)
        return float(sum(cell[way]["seconds"] for way in WAYS))

    def peak(self, op: str, sizes: Sizes, side: str, kind: str = "peak_extra_bytes") -> int:
        """Bytes."""
        peak = self.cell(op, sizes, side)[kind]
        if peak is None:
            raise NotMeasuredError("peak memory is known on CUDA only")
        return int(peak)


def _tells_of(place: str, op: str, sizes: Sizes, side: str) -> bool:
    """Whether a line of `others` ("OP, SIDE"; "OP SIZES, SIDE"; "OP") is of this cell, by the sizes' first number."""
    name, number = next(iter(sizes.items()))
    first = f"{op} {number} {name.replace('_', ' ')}"
    return place in (op, f"{op}, {side}") or (place.startswith(first) and place.endswith(f", {side}"))


@dataclass(frozen=True)
class Target:
    """A bound on a number.

    Args:
        name: what is compared.
        bound: to be reached, or not to be passed where `at_most`.
        measure: the number, from a run; raises NotMeasuredError.
    """

    name: str
    bound: float
    measure: Callable[[Run], float]
    at_most: bool = False

    def report(self, run: Run) -> dict[str, Any]:
        """The target's line, ready for JSON."""
        line = {"target": self.name, "needed": f"{'at most' if self.at_most else 'at least'} {self.bound:g}"}
        try:
            if run.result["machine"]["device"] == "CPU":
                raise NotMeasuredError("it is a GPU's, this is the CPU")
            found = self.measure(run)
        except NotMeasuredError as error:
            return line | {"found": None, "outcome": NOT_MEASURED, "reason": str(error)}
        held = found <= self.bound if self.at_most else found >= self.bound
        return line | {"found": found, "outcome": HELD if held else MISSED, "reason": None}


def speed(op: str, sizes: Sizes, ours: str, other: str) -> Callable[[Run], float]:
    """A target's measure: how many times as fast as the other side ours is."""
    return lambda run: run.seconds(op, sizes, other) / run.seconds(op, sizes, ours)


def time_over(op: str, sizes: Sizes, ours: str, other: str) -> Callable[[Run], float]:
    """Our time over the other side's."""
    return lambda run: run.seconds(op, sizes, ours) / run.seconds(op, sizes, other)


def memory(op: str, sizes: Sizes, ours: str, other: str) -> Callable[[Run], float]:
    """Our peak over the other side's, results and gradients included."""
    return lambda run: run.peak(op, sizes, ours) / run.peak(op, sizes, other)


ROW: Sizes = {"heads": 32, "kv_heads": 8, "width": 128}
LENGTHS = (16384, 65536, 131072)
LOSS: Sizes = {"tokens": 8192, "hidden": 4096, "vocabulary": 131072}
FRONT: Sizes = {"images": 64, "side": 27, "width": 1152, "factor": 2}
PROJECTOR: Sizes = {"images": 64, "side": 27, "width": 1152, "hidden": 3584}
PROTOTYPES: Sizes = {"images": 8, "tokens": 576, "width": 1024, "prototypes": 256}
LINEARS = tuple(
    {"tokens": 8192, "inputs": i, "outputs": o} for i, o in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
)


def of_full_logits(run: Run) -> float:
    """Peak of our loss, what it returns left out, over the logits of all tokens in the inputs' dtype."""
    element = 2 if run.result["dtype"] == "bfloat16" else 4
    peak = run.peak("linear_cross_entropy", LOSS, "ours", "peak_work_bytes")
    return peak / (LOSS["tokens"] * LOSS["vocabulary"] * element)


def of_copy_bandwidth(run: Run) -> float:
    """The front end's least traffic per second over a copy's."""
    cell = run.cell("space_to_depth_norm", FRONT, TRITON)
    moved = sum(cell[way]["bytes"] for way in WAYS)
    return float(moved / run.seconds("space_to_depth_norm", FRONT, TRITON) / run.result["ceilings"]["bytes_per_second"])


def of_linears(run: Run) -> float:
    """Ratio over all four linear layers together, in the inputs' dtype over FP8."""
    plain, fp8 = (sum(run.seconds("fp8_linear", sizes, side) for sizes in LINEARS) for side in ("torch", TRITON))
    return plain / fp8


def of_step(run: Run) -> float:
    """Never here."""
    raise NotMeasuredError(ELSEWHERE)


TARGETS = (
    *(
        Target(
            f"attention, causal, {length // 1024}k positions: times as fast as cuDNN",
            0.75,
            speed("attention", {"positions": length, **ROW}, TRITON, "cudnn"),
        )
        for length in LENGTHS
    ),
    *(
        Target(
            f"ring of 8, {length // 1024}k positions: times as fast as the fastest backend's calls and a merge",
            1.10,
            speed("attention_into", {"positions": length, **ROW}, TRITON, "calls"),
        )
        for length in LENGTHS
    ),
    *(
        Target(
            f"linear cross entropy, {tokens // 1024}k tokens: time over matrix product and cross entropy",
            bound,
            time_over("linear_cross_entropy", {**LOSS, "tokens": tokens}, "ours", "plain"),
            at_most=True,
        )
        for tokens, bound in ((8192, 1.15), (32768, 1.0))
    ),
    Target(
        "linear cross entropy, 8k tokens: peak memory, results left out, over all logits",
        0.10,
        of_full_logits,
        at_most=True,
    ),
    Target(
        "projector front end: times as fast as torch eager",
        2.0,
        speed("space_to_depth_norm", FRONT, TRITON, "torch"),
    ),
    Target(
        "projector front end: times as fast as torch.compile",
        1.3,
        speed("space_to_depth_norm", FRONT, TRITON, COMPILED),
    ),
    Target("projector front end: share of a copy's bandwidth", 0.70, of_copy_bandwidth),
    Target(
        "whole projector: peak memory over torch eager's",
        0.60,
        memory("downsample_projector", PROJECTOR, TRITON, "eager"),
        at_most=True,
    ),
    Target(
        "prototype extractor: times as fast as the published formulation",
        5.0,
        speed("prototype_extract", PROTOTYPES, "torch", "reference"),
    ),
    Target(
        "prototype extractor: peak memory over the published formulation's",
        0.05,
        memory("prototype_extract", PROTOTYPES, "torch", "reference"),
        at_most=True,
    ),
    Target("FP8 linears of an 8B model, four layers, quantising included: times as fast as bf16", 1.5, of_linears),
    Target("whole step, bf16: share of the measured matrix rate", STEP_SHARE, of_step),
    Target("whole step: times as fast in FP8 as in bf16", STEP_FP8, of_step),
)


def report(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per target; `result` as the benchmark writes it."""
    return [target.report(Run(result)) for target in TARGETS]


def words(line: Mapping[str, Any]) -> str:
    """A target's line, for people."""
    if line["outcome"] == NOT_MEASURED:
        return f"{line['target']}: needed {line['needed']}; {NOT_MEASURED}: {line['reason']}"
    return f"{line['target']}: {line['found']:.3g}, needed {line['needed']}: {line['outcome']}"


def step_lines(folder: Path) -> Iterator[str]:
    """Lines on the whole step, from the GPU suite's kernels_gpu.json, step_gpu.json and step_fp8_gpu.json."""
    found = {name: _read(folder / f"{name}_gpu.json") for name in ("kernels", "step", "step_fp8")}

    def ours(name: str, number: str) -> float:
        return float(_there(found, name)["sides"]["megatron_vlm"][number])

    def share(run: Run) -> float:
        return ours("step", "model_flops_per_second") / float(_there(found, "kernels")["ceilings"]["flops_per_second"])

    def gain(run: Run) -> float:
        return ours("step_fp8", "tokens_per_second") / ours("step", "tokens_per_second")

    device = (found["step"] or found["step_fp8"] or {"machine": {"device": ""}})["machine"]["device"]
    for target, measure in zip(TARGETS[-2:], (share, gain), strict=True):
        measured = Target(target.name, target.bound, measure)
        yield words(measured.report(Run({"machine": {"device": device}})))


def _read(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _there(found: Mapping[str, dict[str, Any] | None], name: str) -> dict[str, Any]:
    result = found[name]
    if result is None:
        raise NotMeasuredError(f"there is no {name}_gpu.json")
    return result


if __name__ == "__main__":
    for line in step_lines(Path(sys.argv[1])):
        print(f"- {line}")
