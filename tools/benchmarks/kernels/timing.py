"""Runs the sides of a kernel benchmark's case in turn: seconds, peak memory, errors; and measures the ceilings.

Hazard of timing short kernels: a host that launches slower than the device computes measures itself. On CUDA the device
is therefore given a long write first, which also empties its cache, so that all launches wait in its queue.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError

from .case import OURS, Backward, Case, Draw, Forward, Outputs, Sizes, Tensors, Work

COMPILED = "torch.compile"
WRITE_BYTES, NUM_WRITES = 2**30, 2  # about half a millisecond of a large GPU's time
FACTOR = 2.0  # of plain torch's error, by which a kernel is judged (tests/kernels/accuracy.py)
NUM_DRAWS = 4  # an error of a sum that cancels differs by a factor of 20 between draws
NUM_TINY_DRAWS = 16  # of a few numbers' sum the largest error of 4 draws still differs by a factor of 3 between sides
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
MATRIX = {"cuda": 8192, "cpu": 512}
TINY_COPY_BYTES, TINY_MATRIX = 2**20, 64
ADVICE = "; use 'auto' or another backend"  # of dispatch: of no use here
MIN_ROUNDS, SECONDS_PER_SIZE = 3, 6.0  # after so many seconds no further round begins, from the third on


@dataclass(frozen=True)
class Bench:
    """Device and repetitions of a measurement."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    tiny: bool

    @cached_property
    def space(self) -> Tensor:
        """Memory that is written over before a measurement."""
        return torch.empty(WRITE_BYTES, dtype=torch.int8, device=self.device)

    def draw(self, case: Case, sizes: Sizes, dtype: torch.dtype | None = None, number: int = 0) -> Tensors:
        """The same inputs at every call with a number; in another dtype, the same values."""
        generator = torch.Generator(self.device).manual_seed(number)
        inputs = case.draw(sizes, Draw(self.device, self.dtype, generator))
        if dtype is not None:
            inputs = {name: x.to(dtype) if x.dtype == self.dtype else x for name, x in inputs.items()}
        for name in case.trained:
            inputs[name].requires_grad_()
        return inputs

    def seconds(self, *passes: Callable[[], Any]) -> list[float]:
        """Seconds of each pass, one after the other."""
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for one in passes:
                one()
                marks.append(time.perf_counter())
            return [after - before for before, after in zip(marks, marks[1:], strict=False)]
        torch.cuda.synchronize(self.device)
        for _ in range(NUM_WRITES):
            self.space.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(passes) + 1)]
        events[0].record()
        for one, event in zip(passes, events[1:], strict=True):
            one()
            event.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]


@dataclass(frozen=True)
class Side:
    """One way to compute a case."""

    forward: Forward
    backward: Backward


def ceilings(bench: Bench) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and operations per second of a matrix product."""
    kind = bench.device.type
    size = TINY_COPY_BYTES if bench.tiny else COPY_BYTES[kind]
    width = TINY_MATRIX if bench.tiny else MATRIX[kind]
    source, target = (torch.zeros(size, dtype=torch.int8, device=bench.device) for _ in range(2))
    left, right = (torch.randn(width, width, device=bench.device).to(bench.dtype) for _ in range(2))
    copy = [bench.seconds(lambda: target.copy_(source))[0] for _ in range(bench.rounds + 2)][2:]
    product = [bench.seconds(lambda: left @ right)[0] for _ in range(bench.rounds + 2)][2:]
    return {
        "bytes_per_second": 2 * size / statistics.median(copy),
        "flops_per_second": 2 * width**3 / statistics.median(product),
    }


def side_names(case: Case) -> list[str]:
    """Names of all its sides, whether they can run here or not."""
    backends = [backend.name for backend in case.operation.backends] if case.operation else []
    return [*backends, *([COMPILED] if case.compiles else []), *case.others]


def is_ours(case: Case, name: str) -> bool:
    """Whether a side is the product's own code, whose failure is the benchmark's."""
    return name == OURS or (name != COMPILED and name not in case.others)


def sides_of(case: Case, names: Sequence[str]) -> dict[str, Side]:
    """Function that runs for each name."""
    return {name: _side(case, name) for name in names}


def _by_autograd(case: Case, name: str) -> Backward:
    def backward(inputs: Tensors, outputs: Outputs, grads: Outputs) -> Outputs:
        found = torch.autograd.grad(outputs, [inputs[leaf] for leaf in case.trained], grads)
        return case.accumulate(inputs, found, name)

    return backward


def _side(case: Case, name: str) -> Side:
    by_autograd = _by_autograd(case, name)
    if name == COMPILED:
        backward: Backward = by_autograd
        if case.reference_backward is not None:
            backward = torch.compile(case.reference_backward, dynamic=False)
        return Side(torch.compile(case.reference, dynamic=False), backward)
    if name in case.others:
        return Side(case.others[name], by_autograd)
    return Side(lambda inputs: case.call(inputs, name), case.backward(name) if case.backward else by_autograd)


def _objection(bench: Bench, case: Case, name: str, inputs: Tensors) -> str | None:
    """Reason why a backend of ours is not measured though it could run: interpreted times of real sizes say little."""
    if bench.tiny or case.operation is None:
        return None
    found = [one for one in case.operation.backends if one.name == name]
    return found[0].objection(*inputs.values()) if found else None


def reason_of(error: Exception) -> str:
    """Reason why a side has no numbers; "not run" where that is as it should be, else the traceback goes to stderr."""
    if isinstance(error, ConfigError):
        return f"not run: {str(error).removesuffix(ADVICE)}"
    if isinstance(error, ModuleNotFoundError):
        return f"not run: {error.name} is not installed"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _gradients(outputs: Outputs) -> Outputs:
    """The same random gradients for every side."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(
        torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype) for x in outputs
    )


def _once(side: Side, inputs: Tensors, grads: Outputs | None = None) -> tuple[Outputs, Outputs]:
    """(outputs, gradients), one forward and one backward pass."""
    outputs = side.forward(inputs)
    return outputs, side.backward(inputs, outputs, _gradients(outputs) if grads is None else grads)


def times(
    bench: Bench, case: Case, sizes: Sizes, sides: dict[str, Side]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(side -> what was measured, side -> why it was not), the sides taking turns."""
    inputs = bench.draw(case, sizes)
    reasons: dict[str, str] = {}
    peaks: dict[str, dict[str, int | None]] = {}
    grads: dict[str, Outputs] = {}
    for name, side in sides.items():
        reason = _objection(bench, case, name, inputs)
        if reason is not None:
            reasons[name] = f"not run: {reason}"
            continue
        try:
            grads[name] = _gradients(_once(side, inputs)[0])  # the first one compiles
            peaks[name] = _peaks(bench, side, inputs, grads[name])
        except Exception as error:  # others' code may fail in any way, and so may ours on a new GPU: it is told
            reasons[name] = reason_of(error)
    rounds: dict[str, list[list[float]]] = {name: [] for name in peaks}
    started = time.perf_counter()
    for number in range(bench.rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - started > SECONDS_PER_SIZE:
            break
        for name in peaks:
            rounds[name].append(_round(bench, sides[name], inputs, grads[name]))
    work = case.work(sizes, bench.dtype.itemsize)
    cells = {name: _cell(of_side, work, peaks[name]) for name, of_side in rounds.items()}
    return cells, reasons


def _round(bench: Bench, side: Side, inputs: Tensors, grads: Outputs) -> list[float]:
    """[seconds forward, seconds backward]."""
    outputs: list[Outputs] = []
    return bench.seconds(lambda: outputs.append(side.forward(inputs)), lambda: side.backward(inputs, outputs[0], grads))


def _peaks(bench: Bench, side: Side, inputs: Tensors, grads: Outputs) -> dict[str, int | None]:
    """Most bytes allocated at a time above what was there before a pass in both directions; known on CUDA only.

    Work: without the outputs in the forward pass, without outputs and gradients in the backward pass.
    """
    if bench.device.type != "cuda":
        return {"peak_extra_bytes": None, "peak_work_bytes": None}
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    outputs = side.forward(inputs)
    forward = torch.cuda.max_memory_allocated(bench.device) - before
    torch.cuda.reset_peak_memory_stats(bench.device)
    gradients = side.backward(inputs, outputs, grads)
    backward = torch.cuda.max_memory_allocated(bench.device) - before
    results = [made_bytes(tensors, inputs.values()) for tensors in (outputs, (*outputs, *gradients))]
    work = max(forward - results[0], backward - results[1])
    return {"peak_extra_bytes": max(forward, backward), "peak_work_bytes": work}


def made_bytes(results: Outputs, inputs: Iterable[Tensor]) -> int:
    """Memory that results take, without what they share with the inputs."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    made = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return sum(size for place, size in made.items() if place not in given)


def _cell(rounds: list[list[float]], work: tuple[Work, Work], peaks: dict[str, int | None]) -> dict[str, Any]:
    cell: dict[str, Any] = {**peaks}
    for place, way in enumerate(("forward", "backward")):
        cell[way] = {
            "seconds": statistics.median(one[place] for one in rounds),
            "all_seconds": [one[place] for one in rounds],
            "bytes": work[place].num_bytes,
            "flops": work[place].flops,
        }
    return cell


def errors(bench: Bench, case: Case, sides: dict[str, Side]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(side -> its largest error and plain torch's of the same tensor, side -> why none) against the twin in fp64.

    Of several draws, the same for all sides. Largest: in units of what is allowed: twice plain torch's largest, or the
    case's tolerance. An error is the norm of the difference over the norm. torch.compile has none: it would compile the
    twin once more for this size.
    """
    sizes = case.tiny[0] if bench.tiny else case.exact
    num_draws = NUM_TINY_DRAWS if bench.tiny and case.tolerance is None else NUM_DRAWS
    draws = [_exact(bench, case, sizes, number) for number in range(num_draws)]
    plain = _largest([errors_of_draw for _, _, errors_of_draw in draws])
    found: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for name, side in sides.items():
        if name == COMPILED or _objection(bench, case, name, bench.draw(case, sizes)) is not None:
            continue
        try:
            ours = _largest(
                [
                    _errors(_once(side, bench.draw(case, sizes, number=number), grads), exact)
                    for number, (grads, exact, _) in enumerate(draws)
                ]
            )
        except Exception as error:  # as in `times`
            reasons[name] = reason_of(error)
            continue
        floor = torch.finfo(bench.dtype).eps / 2
        allowed = [case.tolerance or max(FACTOR * one, floor) for one in plain]
        worst = max(range(len(ours)), key=lambda place: ours[place] / allowed[place])
        exact_enough = ours[worst] <= allowed[worst]
        found[name] = {"error": ours[worst], "plain_error": plain[worst], "exact_enough": exact_enough}
    return found, reasons


def _exact(bench: Bench, case: Case, sizes: Sizes, number: int) -> tuple[Outputs, list[Tensor], list[float]]:
    """(gradients of the outputs, the twin's results in fp64, plain torch's error of each) of a draw."""
    twin = Side(case.reference, case.reference_backward or _by_autograd(case, "reference"))
    outputs, gradients = _once(twin, bench.draw(case, sizes, number=number))
    grads = _gradients(outputs)
    exact = _flat(_once(twin, bench.draw(case, sizes, torch.float64, number), tuple(x.double() for x in grads)))
    return grads, exact, _errors((outputs, gradients), exact)


def _largest(of_draws: Sequence[Sequence[float]]) -> list[float]:
    """The largest error of each tensor over all draws."""
    return [max(of_tensor) for of_tensor in zip(*of_draws, strict=True)]


def _errors(results: tuple[Outputs, Outputs], exact: Sequence[Tensor]) -> list[float]:
    return [_error(one, other) for one, other in zip(_flat(results), exact, strict=True)]


def _flat(results: tuple[Outputs, Outputs]) -> list[Tensor]:
    return [x.detach() for part in results for x in part]


def _error(found: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))
