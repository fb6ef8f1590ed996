"""A linear layer whose three GEMMs run in FP8 with one scale per tensor, chosen anew at every use (DESIGN D9).

Forward y = x W^T, and in the backward pass dx = dy W and dW = dy^T x, each on `torch._scaled_mm`, which multiplies a
row-major by a column-major matrix. So every operand is needed both ways round, and quantising writes both copies in one
read. x and W are E4M3; dy is E4M3 or E5M2. Sums are fp32 and results have the input's dtype, gradients of the weight
the weight's. Of x only the FP8 transpose is kept for the backward pass; W is cast again then, with the scale it had.

A GEMM wants multiples of 16. What is missing is filled with zeros as the FP8 copies are written; zeros are the largest
of nothing, so no scale and no result depends on them. Tokens that reach no loss can be left out of the scale, too.

Hazards: where a scale is stale or fixed, what is too large is clamped and training goes on, slightly or badly wrong;
here it is always the tensor's own. Scales stay on the device: nothing waits for the host. On a CPU without FP8
instructions torch's product may be hundreds of times slower than fp32's: `auto` measures it once and takes the twin.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.ops import reference_fp8
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection, triton_obstacle
from megatron_vlm.ops.reference_fp8 import ALIGNMENT, LARGEST, Fp8Matrix

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
MIN_CAPABILITY = (8, 9)  # of a GPU with FP8 GEMMs: Ada, Hopper and later
MAX_CPU_SLOWNESS = 8.0  # far above what a busy machine makes of equal times, far below the hundreds of a slow processor
_SIDE = 64  # of the measured product: 0.1 ms, and 9 ms where it is slow

QUANTISE: Operation[Callable[..., tuple[Tensor | None, Tensor | None, Tensor]]] = Operation("ops.fp8_quantise")
MATMUL: Operation[Callable[..., Tensor]] = Operation("ops.fp8_matmul")


def quantise(
    x: Tensor,
    dtype: torch.dtype,
    *,
    counted: Tensor | None = None,
    scale: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    backend: str = AUTO,
) -> Fp8Matrix:
    """x [m, n] fp32, bf16 or fp16 -> FP8, divided by the smallest power of two with which nothing is too large.

    Args:
        dtype: E4M3 or E5M2.
        counted: [m] bool, the rows that make the scale; what is too large in the others is clamped. Default: all.
        scale: as an earlier call chose it for this x; default: chosen now.
        rows, columns: which copies are made: as it is, transposed.
        backend: auto | triton | reference.

    Returns:
        The copies, each side padded with zeros to a multiple of 16. Where x is not finite in a row that counts, the
        scale is infinite, and so nothing computed from it is finite.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    amax = None if scale is None else _amax_of(scale, dtype)
    function = QUANTISE.select(backend, x)
    if not x.numel():  # a rank without tokens: no kernel is started, and no maximum of nothing asked for
        return _nothing(x, dtype, scale, rows, columns)
    by_rows, by_columns, scale = function(x.contiguous(), dtype, counted=counted, amax=amax, rows=rows, columns=columns)
    return Fp8Matrix(by_rows, by_columns, scale, (x.shape[0], x.shape[1]))


def _nothing(x: Tensor, dtype: torch.dtype, scale: Tensor | None, rows: bool, columns: bool) -> Fp8Matrix:
    """The result of `quantise` for an x without a number."""
    padded = [-(-side // ALIGNMENT) * ALIGNMENT for side in x.shape]
    zeros = torch.zeros(padded, dtype=torch.uint8, device=x.device).view(dtype)
    if scale is None:
        scale = torch.full((1,), torch.finfo(torch.float32).smallest_normal, device=x.device)
    return Fp8Matrix(
        zeros if rows else None, zeros.T.contiguous() if columns else None, scale, (x.shape[0], x.shape[1])
    )


def _amax_of(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An amax that gives this scale again: the largest number it holds, or that of fp32, which would be infinite in its
    place where the scale is one of the largest. An infinite scale stays infinite."""
    amax = scale * LARGEST[dtype]  # exact, but where it overflows
    return torch.where(scale.isinf(), amax, amax.clamp_max(torch.finfo(torch.float32).max))


def matmul(left: Fp8Matrix, right: Fp8Matrix, dtype: torch.dtype, *, backend: str = AUTO) -> Tensor:
    """left [m, k] @ right [n, k]^T -> [m, n] in `dtype`, summed in fp32; of both `rows` is read.

    Args:
        backend: auto | scaled_mm | reference.

    Raises ConfigError where the backend asked for cannot run here.
    """
    assert left.rows is not None and right.rows is not None, "quantised without rows"
    assert E4M3 in (left.rows.dtype, right.rows.dtype), "there is no GEMM of E5M2 with E5M2"
    function = MATMUL.select(backend, left.rows, right.rows)
    if 0 in (*left.shape, *right.shape):  # no sum has a term
        return torch.zeros(left.shape[0], right.shape[0], dtype=dtype, device=left.rows.device)
    product = function(left.rows, right.rows.T, left.scale, right.scale, dtype)  # right: row-major -> column-major
    return product[: left.shape[0], : right.shape[0]].contiguous()  # [m16, n16] -> [m, n]


def transposed(matrix: Fp8Matrix) -> Fp8Matrix:
    """The other way round, nothing copied."""
    return Fp8Matrix(matrix.columns, matrix.rows, matrix.scale, (matrix.shape[1], matrix.shape[0]))


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    gradient_format: torch.dtype = E4M3,
    counted: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """x @ weight^T in FP8, and both gradients.

    Args:
        x: [t, k], fp32, bf16 or fp16.
        weight: [n, k]; where it needs no gradient none is computed, and x is not kept.
        gradient_format: of the gradient of the result: E4M3, or E5M2 with a bit less and more range.
        counted: [t] bool, the tokens whose values make the scale of x. The result of the others is not exact, so they
            must reach no loss: their gradients are then zero, and take no part in a scale either.
        backend: of `quantise`.

    Returns:
        [t, n] in x's dtype.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    assert x.dim() == 2 and x.shape[1] == weight.shape[1], f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert counted is None or counted.shape == x.shape[:1], f"x {tuple(x.shape)}, counted {tuple(counted.shape)}"
    keeps_x = torch.is_grad_enabled() and weight.requires_grad  # within `forward` a graph is never seen to be off
    result: Tensor = _Fp8Linear.apply(x, weight, gradient_format, counted, backend, keeps_x)
    return result


class _Fp8Linear(torch.autograd.Function):
    """y = x W^T;  dx = dy W,  dW = dy^T x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gradient_format: torch.dtype,
        counted: Tensor | None,
        backend: str,
        keeps_x: bool,
    ) -> Tensor:
        quantised = quantise(x, E4M3, counted=counted, columns=keeps_x, backend=backend)
        rows = quantise(weight, E4M3, columns=False, backend=backend)
        ctx.save_for_backward(weight, rows.scale, quantised.columns, quantised.scale)
        ctx.x_shape, ctx.x_dtype = quantised.shape, x.dtype
        ctx.gradient_format, ctx.backend = gradient_format, backend
        return matmul(quantised, rows, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        weight, weight_scale, x_columns, x_scale = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dy = quantise(gradient, ctx.gradient_format, rows=wants_x, columns=wants_weight, backend=ctx.backend)
        dx = dw = None
        if wants_x:
            columns = quantise(weight, E4M3, scale=weight_scale, rows=False, backend=ctx.backend)
            dx = matmul(dy, transposed(columns), ctx.x_dtype)
        if wants_weight:
            x = Fp8Matrix(None, x_columns, x_scale, ctx.x_shape)
            dw = matmul(transposed(dy), transposed(x), weight.dtype)
        return dx, dw, None, None, None, None


def fp8_obstacle(device: torch.device) -> str | None:
    """Reason why FP8 GEMMs cannot run on a device, or None."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        return (
            f"FP8 needs a GPU of compute capability {needed} (Ada, Hopper or later), found {'.'.join(map(str, found))}"
        )
    return None


def _scaled_mm_obstacle(left: Tensor, right: Tensor) -> str | None:
    return fp8_obstacle(left.device)


def _scaled_mm_objection(left: Tensor, right: Tensor) -> str | None:
    slowness = cpu_slowness() if left.device.type == "cpu" else 1.0
    if slowness < MAX_CPU_SLOWNESS:
        return None
    return f"this processor takes {slowness:,.0f} times as long for it as for the same product in fp32"


@cache
def cpu_slowness() -> float:
    """Time of torch's FP8 product on this processor over that of its twin in fp32; measured once.

    Some processors have no instructions for it and get a loop of single numbers: 0.06 GFLOP/s on an Intel Xeon with AMX
    against tens for fp32. Elsewhere the two are about as fast (0.9 to 1.2, AMD EPYC), and differ in no bit there.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIDE, _SIDE, generator=generator).to(E4M3) for _ in range(2))
    one = torch.ones(1)

    def fastest_seconds(product: Callable[..., Tensor]) -> float:
        seconds = []
        for _ in range(3):  # the first one sets the library up
            started = time.perf_counter()
            product(left, right.T, one, one, torch.float32)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return fastest_seconds(_matmul_scaled_mm) / fastest_seconds(reference_fp8.fp8_matmul)


@QUANTISE.backend(TRITON, triton_obstacle, interpreter_objection)
def _quantise_triton(x: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor | None, Tensor | None, Tensor]:
    from megatron_vlm_kernels.fp8_quantise import fp8_quantise

    return fp8_quantise(x, dtype, **options)


QUANTISE.backend("reference")(reference_fp8.fp8_quantise)


@MATMUL.backend("scaled_mm", _scaled_mm_obstacle, _scaled_mm_objection)
def _matmul_scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


MATMUL.backend("reference")(reference_fp8.fp8_matmul)
