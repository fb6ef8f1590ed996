"""Bias and GELU in one pass, exact, by tanh, or quick (Hendrycks and Gimpel 2016).

    z = x + b;   y = gelu(z)
    exact: z Phi(z)     tanh: z (1 + tanh(u)) / 2, u = sqrt(2 / pi) (z + 0.044715 z^3)     quick: z sigmoid(1.702 z)
    dx = dy gelu'(z),   db = sum over rows of dx

Backward keeps x alone and computes z again. db is deterministic: each program sums its rows in order and writes one
partial row, and torch adds those up; it sums the gradients before they are rounded. All arithmetic is fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlm_kernels.outputs import stored_dtype

KINDS = {"exact": 0, "tanh": 1, "quick": 2}
BLOCK_ROWS, BLOCK_COLUMNS = 16, 256
MAX_ROW_SHARES = 512  # partial rows of db

# Hazard: the interpreter multiplies a tensor by one of these only where the tensor comes first.
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWICE_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_CUBE, THRICE_TANH_CUBE = tl.constexpr(0.044715), tl.constexpr(0.134145)
QUICK_SLOPE = tl.constexpr(1.702)


@triton.jit
def _gelu(z, KIND: tl.constexpr):
    if KIND == 0:
        return z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    elif KIND == 1:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return z * tl.sigmoid((z + z * z * z * TANH_CUBE) * TWICE_TANH_SCALE)
    else:
        return z * tl.sigmoid(z * QUICK_SLOPE)


@triton.jit
def _gelu_slope(z, KIND: tl.constexpr):  # 1 - sigmoid(u) is sigmoid(-u), without cancelling
    if KIND == 0:
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * DENSITY * tl.exp(-0.5 * z * z)
    elif KIND == 1:
        u = (z + z * z * z * TANH_CUBE) * TWICE_TANH_SCALE
        gate = tl.sigmoid(u)
        return gate + z * gate * tl.sigmoid(-u) * TWICE_TANH_SCALE * (z * z * THRICE_TANH_CUBE + 1.0)
    else:
        u = z * QUICK_SLOPE
        gate = tl.sigmoid(u)
        return gate + z * gate * tl.sigmoid(-u) * QUICK_SLOPE


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_columns,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile of y."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows[:, None] * num_columns + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + at, _gelu(z, KIND).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_out_ptr,
    x_ptr,
    bias_ptr,
    grad_x_ptr,
    grad_bias_ptr,
    num_rows,
    num_columns,
    rows_per_program,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A share of the rows (axis 0) in one block of columns (axis 1): dx, and the share's part of db."""
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < num_columns
    bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    grad_bias = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (rows < last)[:, None] & column_inside[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        grad_out = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_x = grad_out * _gelu_slope(z, KIND)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_bias += tl.sum(grad_x, axis=0)
    at = tl.program_id(0).to(tl.int64) * num_columns + columns
    tl.store(grad_bias_ptr + at, grad_bias, mask=column_inside)


def forward(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    """x [t, h] contiguous, bias [h] -> y [t, h]; kind as in KINDS."""
    num_rows, num_columns = x.shape
    out = torch.empty(x.shape, dtype=stored_dtype(x.dtype), device=x.device)
    if out.numel():
        grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(num_columns, BLOCK_COLUMNS))
        _forward_kernel[grid](
            x, bias, out, num_rows, num_columns, KIND=KINDS[kind], BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS
        )
    return out.to(x.dtype)


def backward(grad_out: Tensor, x: Tensor, bias: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """dy, x [t, h] contiguous, bias [h] -> dx [t, h], db [h] fp32."""
    num_rows, num_columns = x.shape
    grad_x = torch.empty(x.shape, dtype=stored_dtype(x.dtype), device=x.device)
    if not grad_x.numel():
        return grad_x.to(x.dtype), torch.zeros(num_columns, dtype=torch.float32, device=x.device)
    blocks_per_program = triton.cdiv(triton.cdiv(num_rows, BLOCK_ROWS), MAX_ROW_SHARES)
    rows_per_program = blocks_per_program * BLOCK_ROWS
    num_shares = triton.cdiv(num_rows, rows_per_program)
    partial = torch.empty(num_shares, num_columns, dtype=torch.float32, device=x.device)
    _backward_kernel[(num_shares, triton.cdiv(num_columns, BLOCK_COLUMNS))](
        grad_out, x, bias, grad_x, partial, num_rows, num_columns, rows_per_program,
        KIND=KINDS[kind], BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    return grad_x.to(x.dtype), partial.sum(0)


class BiasGelu(torch.autograd.Function):
    """(x [..., h], bias [h], kind) -> gelu(x + bias)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, kind: str) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # [..., h] -> [t, h]
        ctx.save_for_backward(rows, bias)
        ctx.kind = kind
        return forward(rows, bias.contiguous(), kind).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, bias = ctx.saved_tensors
        shape = grad_out.shape
        grad_x, grad_bias = backward(grad_out.reshape(rows.shape).contiguous(), rows, bias.contiguous(), ctx.kind)
        return grad_x.view(shape), grad_bias.to(bias.dtype) if ctx.needs_input_grad[1] else None, None
