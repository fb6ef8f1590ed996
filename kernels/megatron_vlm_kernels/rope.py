"""Rotary position embedding of every head of a token at once, from tables of that token's angles (Su et al. 2021).

    y_i = x_i cos_i - x_(i + d/2) sin_i,     y_(i + d/2) = x_(i + d/2) cos_i + x_i sin_i,     i < d/2

Pairs are in Hugging Face's order. The backward pass is the same rotation by the opposite angle, on the gradient, in its
own memory where it may be overwritten. All arithmetic is fp32. Inputs may have any strides but along a head, so a
projection's [s, b, heads, d] is read where it lies.

Letters: b rows, s positions, d head width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlm_kernels import tile_elements

TILE_ELEMENTS = 2048  # of each half
NUM_WARPS = 4


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_tokens,
    num_positions,
    num_heads,
    half,
    x_row,
    x_position,
    x_head,
    table_row,
    table_position,
    out_row,
    out_position,
    out_head,
    BACKWARD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """A tile [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF]. All of it is read before any is written: `out` may be `x`."""
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None, None]
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :, None]
    place = tl.arange(0, BLOCK_HALF)[None, None, :]
    row, position = token // num_positions, token % num_positions
    has_table = (token < num_tokens) & (place < half)
    inside = has_table & (head < num_heads)
    table = row * table_row + position * table_position + place
    cos = tl.load(cos_ptr + table, mask=has_table, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=has_table, other=0.0).to(tl.float32)
    if BACKWARD:
        sin = -sin
    source = row * x_row + position * x_position + head * x_head + place
    left = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x_ptr + source + half, mask=inside, other=0.0).to(tl.float32)
    target = row * out_row + position * out_position + head * out_head + place
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + target, (left * cos - right * sin).to(kind), mask=inside)
    tl.store(out_ptr + target + half, (right * cos + left * sin).to(kind), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False, in_place: bool = False) -> Tensor:
    """Every head of x by its position's angles, by the opposite ones for `backward`.

    Args:
        x: [b, s, heads, d], any strides but along d, which is 1.
        cos, sin: [b, s, d/2], each 1 along d/2; strides of 0 repeat a table over rows or positions.
        in_place: x itself is overwritten and returned; no element of it may share memory with another.

    Returns:
        [b, s, heads, d] in x's dtype, contiguous where it is new.
    """
    num_rows, num_positions, num_heads, width = x.shape
    assert x.stride(3) == 1 and cos.stride() == sin.stride() and cos.stride(2) == 1, "a head lies in one piece"
    out = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    num_tokens, tile = num_rows * num_positions, _tile(num_heads, width // 2)
    _rotate_kernel[(triton.cdiv(num_tokens, tile["BLOCK_TOKENS"]), triton.cdiv(num_heads, tile["BLOCK_HEADS"]))](
        x,
        cos,
        sin,
        out,
        num_tokens,
        num_positions,
        num_heads,
        width // 2,
        *x.stride()[:3],
        *cos.stride()[:2],
        *out.stride()[:3],
        BACKWARD=backward,
        num_warps=NUM_WARPS,
        **tile,
    )
    return out


def _tile(num_heads: int, half: int) -> dict[str, int]:
    """The tile: several heads of one token, or all heads of several tokens."""
    block_half, elements = triton.next_power_of_2(half), tile_elements(TILE_ELEMENTS)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, elements // block_half))
    block_tokens = max(1, elements // (block_heads * block_half))
    return {"BLOCK_TOKENS": block_tokens, "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half}


def _in_one_piece(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _overlaps(x: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor or of sliding windows do: unless each dimension
    steps over all that those with smaller steps reach."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


class Rope(torch.autograd.Function):
    """(x [b, s, heads, d], cos and sin [b or 1, s or 1, d/2], whether the gradient may be overwritten) -> as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, gradient_in_place: bool) -> Tensor:
        shape = (x.shape[0], x.shape[1], x.shape[3] // 2)
        cos, sin = (_in_one_piece(table).expand(shape) for table in (cos, sin))
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.gradient_in_place = gradient_in_place
        return rotate(_in_one_piece(x), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        in_place = ctx.gradient_in_place and not _overlaps(grad_out)
        return rotate(_in_one_piece(grad_out), *ctx.saved_tensors, backward=True, in_place=in_place), None, None, None
