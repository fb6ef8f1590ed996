"""Plain-torch twins of the FP8 operations. Letters: m rows, n columns, t tokens; m16: m rounded up to 16.

FP8 is two formats (Micikevicius et al. 2022): E4M3 up to 448 with 3 bits of mantissa, for activations and weights, and
E5M2 up to 57344 with 2, whose range suits gradients. torch's cast turns what is larger into NaN: it is clamped first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
ALIGNMENT = 16  # what an FP8 GEMM needs every side of its matrices to be a multiple of
_MIN_EXPONENT = -126  # of scales: the smallest normal number


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix [m, n] in FP8: a number is about q * scale.

    Args:
        rows: q [m16, n16], row-major, zeros behind m and n; None where it was not asked for.
        columns: its transpose [n16, m16], row-major; None where it was not asked for.
        scale: fp32 [1], a power of two.
        shape: (m, n).
    """

    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor
    shape: tuple[int, int]


def fp8_amax(x: Tensor, counted: Tensor | None) -> Tensor:
    """The largest size in the rows that count, fp32; infinite where one is NaN. x [m, n], counted [m] bool."""
    sizes = x.detach().float().abs()
    sizes = torch.where(sizes.isnan(), torch.inf, sizes)
    if counted is not None:
        sizes = sizes.masked_fill(~counted[:, None], 0.0)
    return sizes.amax()


def fp8_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two by which amax divided is in the format's range, fp32 [1]; infinite where amax is."""
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, fraction in [0.5, 1)
    largest_fraction, largest_exponent = math.frexp(LARGEST[dtype])
    exponent = exponent - largest_exponent + (fraction > largest_fraction).int()
    exponent = exponent.masked_fill(amax == 0, _MIN_EXPONENT).clamp_min(_MIN_EXPONENT)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    return torch.where(amax.isinf(), amax, scale).reshape(1)


def fp8_quantise(
    x: Tensor,
    dtype: torch.dtype,
    *,
    counted: Tensor | None = None,
    amax: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Plain twin of the kernel: see `ops.fp8.quantise`."""
    scale = fp8_scale(fp8_amax(x, counted) if amax is None else amax.reshape(()), dtype)
    inverse = scale.clamp_max(2.0**126).reciprocal()
    largest = LARGEST[dtype]
    q = (x.detach().float() * inverse).clamp(-largest, largest).to(dtype)
    q = functional.pad(q.view(torch.uint8), (0, -q.shape[1] % ALIGNMENT, 0, -q.shape[0] % ALIGNMENT)).view(dtype)
    return q if rows else None, q.T.contiguous() if columns else None, scale


def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a * scale_a) @ (b * scale_b): a [m16, k16] row-major, b [k16, n16] column-major, FP8 -> [m16, n16]."""
    return (a.float() @ b.float() * (scale_a * scale_b)).to(dtype)
