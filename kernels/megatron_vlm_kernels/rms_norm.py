"""RMSNorm, and the residual addition before it, in one pass over the rows (Zhang and Sennrich 2019).

    s = x + residual                                    (rounded to x's dtype: it is what the next layer reads)
    y = s * r * w,  r = 1 / sqrt(mean(s^2) + eps)
    ds = r * (g - n * mean(g * n)) + ds_later,  g = dy * w,  n = s * r;     dx = dresidual = ds
    dw = sum over rows of dy * n

All arithmetic is fp32. The weight's gradient is deterministic: each program sums its rows in order and writes one
partial row, and torch adds those up. Kept for backward: s (an input, or an output anyway) and r, one number per row.

Hazard: a row must fit one tile, so rows are at most 16,384 wide. Letters: t rows, h columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlm_kernels import tile_elements
from megatron_vlm_kernels.limits import MAX_NORM_COLUMNS

TILE_ELEMENTS = 4096  # several short rows share a program
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    inverse_ptr,
    num_rows,
    num_columns,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile of rows: (y, r), and s where there is a residual."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < num_columns
    inside = row_inside[:, None] & column_inside[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]

    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        total = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(total * total, axis=1) / num_columns + eps)
    out = total * inverse[:, None] * weight[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + rows, inverse, mask=row_inside)


@triton.jit
def _backward_kernel(
    grad_out_ptr,
    grad_sum_ptr,
    sum_ptr,
    weight_ptr,
    inverse_ptr,
    grad_in_ptr,
    grad_weight_ptr,
    num_rows,
    num_columns,
    HAS_GRAD_SUM: tl.constexpr,
    WEIGHT_TRAINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Every n-th tile of rows, n programs: ds, and this program's share of dw [BLOCK_COLUMNS] fp32."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for tile in range(program, tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_inside = rows < num_rows
        inside = row_inside[:, None] & column_inside[None, :]
        at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        inverse = tl.load(inverse_ptr + rows, mask=row_inside, other=0.0)
        normed = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        grad_out = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weighted = grad_out * weight[None, :]
        mean = tl.sum(weighted * normed, axis=1) / num_columns
        grad_in = (weighted - normed * mean[:, None]) * inverse[:, None]
        if HAS_GRAD_SUM:
            grad_in += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_in_ptr + at, grad_in.to(grad_in_ptr.dtype.element_ty), mask=inside)
        if WEIGHT_TRAINS:
            grad_weight += tl.sum(grad_out * normed, axis=0)
    if WEIGHT_TRAINS:
        at = program.to(tl.int64) * num_columns + columns
        tl.store(grad_weight_ptr + at, grad_weight, mask=column_inside)


def _plan(num_columns: int) -> dict[str, int]:
    """Tile and warps for rows of that width."""
    assert num_columns <= MAX_NORM_COLUMNS, f"rows of {num_columns}, at most {MAX_NORM_COLUMNS}"
    block_columns = triton.next_power_of_2(num_columns)
    block_rows = max(1, tile_elements(TILE_ELEMENTS) // max(block_columns, 256))
    num_warps = min(16, max(4, block_rows * block_columns // 512))
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "num_warps": num_warps}


def _num_programs(num_tiles: int, device: torch.device) -> int:
    """Number of programs of the backward kernel; two under the interpreter, so that sums are added there too."""
    if device.type != "cuda":
        return min(num_tiles, 2)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_tiles, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)


def norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [t, h] contiguous, weight [h] -> (y [t, h], s [t, h], r [t] fp32); s is x without a residual."""
    num_rows, num_columns = x.shape
    out, inverse = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    plan = _plan(num_columns)
    if num_rows:
        _forward_kernel[(triton.cdiv(num_rows, plan["BLOCK_ROWS"]),)](
            x,
            x if residual is None else residual,
            weight,
            out,
            total,
            inverse,
            num_rows,
            num_columns,
            eps,
            HAS_RESIDUAL=residual is not None,
            **plan,
        )
    return out, total, inverse


def norm_backward(
    grad_out: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor, weight_trains: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y and s, s and grad_* [t, h] contiguous -> (ds [t, h], dw [h] or None where it does not train)."""
    num_rows, num_columns = total.shape
    grad_in = torch.empty_like(total)
    if not num_rows:
        return grad_in, torch.zeros_like(weight) if weight_trains else None
    plan = _plan(num_columns)
    num_programs = _num_programs(triton.cdiv(num_rows, plan["BLOCK_ROWS"]), total.device)
    shape = (num_programs, num_columns) if weight_trains else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=total.device)
    _backward_kernel[(num_programs,)](
        grad_out,
        grad_out if grad_sum is None else grad_sum,
        total,
        weight,
        inverse,
        grad_in,
        partial,
        num_rows,
        num_columns,
        HAS_GRAD_SUM=grad_sum is not None,
        WEIGHT_TRAINS=weight_trains,
        **plan,
    )
    return grad_in, partial.sum(0).to(weight.dtype) if weight_trains else None


class AddRMSNorm(torch.autograd.Function):
    """(x, residual or None, weight, eps) -> y, or (y, s) with a residual; any leading dimensions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # [..., h] -> [t, h]
        added = None if residual is None else residual.reshape(rows.shape).contiguous()
        out, total, inverse = norm_forward(rows, added, weight.contiguous(), eps)
        total = total.view(x.shape)
        ctx.save_for_backward(total, weight, inverse)
        ctx.set_materialize_grads(False)
        out = out.view(x.shape)
        return out if residual is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, inverse = ctx.saved_tensors
        _, adds, weight_trains, _ = ctx.needs_input_grad
        grad_out, grad_sum = grads if len(grads) == 2 else (grads[0], None)
        if grad_out is None:  # only the sum was used
            return grad_sum, grad_sum if adds else None, None, None
        shape = (-1, total.shape[-1])
        grad_in, grad_weight = norm_backward(
            grad_out.reshape(shape).contiguous(),
            None if grad_sum is None else grad_sum.reshape(shape).contiguous(),
            total.view(shape),
            weight.contiguous(),
            inverse,
            weight_trains,
        )
        grad_in = grad_in.view(total.shape)
        return grad_in, grad_in if adds else None, grad_weight, None
