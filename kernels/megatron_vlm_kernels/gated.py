"""A gated unit on gate and up projections that lie side by side, without cutting them apart (Shazeer 2020).

    y = a(gate) * up,  [gate | up] = x [t, 2f];     dgate = dy * up * a'(gate),  dup = dy * a(gate)

a: silu z s(z) (SwiGLU); gelu z F(z) with the normal distribution F (GeGLU) or its tanh form; relu. Nothing but x is
kept for backward: a(gate) is computed again, which is cheaper than reading it. All arithmetic is fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlm_kernels import tile_elements

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
TILE_ELEMENTS = 1024
NUM_WARPS = 4


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """(a(z), a'(z)), fp32."""
    if ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-z))
        value = z * gate
        rest = 1.0 / (1.0 + tl.exp(z))  # 1 - gate would cancel
        slope = gate * (1.0 + z * rest)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * share
        slope = share + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)
        double = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        share = 1.0 / (1.0 + tl.exp(-double))
        rest = 1.0 / (1.0 + tl.exp(double))  # 1 - share would cancel
        value = z * share
        slope = share * (1.0 + rest * z * 1.5957691216057308 * (1.0 + 0.134145 * z * z))
    else:
        value = tl.maximum(z, 0.0)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    return value, slope


@triton.jit
def _forward_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile of y."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < width)
    source = rows * (2 * width) + columns
    gate = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + source + width, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(out_ptr + rows * width + columns, (value * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_out_ptr,
    x_ptr,
    grad_x_ptr,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The gradients of one tile's gate and up."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < width)
    source = rows * (2 * width) + columns
    gate = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + source + width, mask=inside, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    kind = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + source, (grad_out * up * slope).to(kind), mask=inside)
    tl.store(grad_x_ptr + source + width, (grad_out * value).to(kind), mask=inside)


def _plan(num_rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, tile and warps): part of a row, or several short ones."""
    elements = tile_elements(TILE_ELEMENTS)
    block_columns = min(triton.next_power_of_2(width), elements)
    block_rows = elements // block_columns
    grid = triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_columns)
    return grid, {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "num_warps": NUM_WARPS}


def gated_forward(x: Tensor, activation: str) -> Tensor:
    """x [t, 2f] contiguous -> y [t, f]."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, width)
    if out.numel():
        grid, plan = _plan(num_rows, width)
        _forward_kernel[grid](x, out, num_rows, width, ACTIVATION=activation, **plan)
    return out


def gated_backward(grad_out: Tensor, x: Tensor, activation: str) -> Tensor:
    """grad_out [t, f], x [t, 2f], contiguous -> grad_x [t, 2f]."""
    num_rows, width = grad_out.shape
    grad_x = torch.empty_like(x)
    if grad_x.numel():
        grid, plan = _plan(num_rows, width)
        _backward_kernel[grid](grad_out, x, grad_x, num_rows, width, ACTIVATION=activation, **plan)
    return grad_x


class Gated(torch.autograd.Function):
    """(x [..., 2f], activation) -> y [..., f]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.activation = activation
        return gated_forward(x.view(-1, x.shape[-1]), activation).view(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rows = grad_out.reshape(-1, grad_out.shape[-1]).contiguous()  # [..., f] -> [t, f]
        return gated_backward(rows, x.view(-1, x.shape[-1]), ctx.activation).view(x.shape), None
