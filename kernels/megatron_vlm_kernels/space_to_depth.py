"""Space to depth and LayerNorm in one pass: squares of factor x factor patches -> one normalised token each.

    v = the square's patches, row by row, zeros outside the grid: k = factor^2 c numbers    (never stored)
    y = n * w + b,  n = (v - mean) * r,  r = 1 / sqrt(mean((v - mean)^2) + eps)
    dv = r * (g - mean(g) - n * mean(g * n)),  g = dy * w;   dx is dv's patches, each of which is in one square only
    dw = sum over squares of dy * n,   db = sum over squares of dy

Forward and dx read the neighbouring patches where they are; a program has one square. dw and db are a second pass,
whose programs each sum a share of the squares in order and write one partial row; torch adds those up, so they are
deterministic. Squares are numbered row by row or column by column. All arithmetic is fp32; kept for backward are the
input, the mean and r.

Hazard: a square is one tile of at most 65,536 numbers, a row of patches padded to a power of two each.

n images, t patches of an image, c channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlm_kernels.limits import MAX_SQUARE_NUMBERS, square_numbers
from megatron_vlm_kernels.outputs import stored_dtype

SUM_TOKENS, SUM_CHANNELS = 32, 128  # the tile of the second pass
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _square(token, out_h, out_w, FACTOR: tl.constexpr, ROW_MAJOR: tl.constexpr):
    """Number of a square -> its image, and the row and column of its first patch."""
    image = token // (out_h * out_w)
    at = token % (out_h * out_w)
    if ROW_MAJOR:
        row, column = at // out_w, at % out_w
    else:
        row, column = at % out_h, at // out_h
    return image, row * FACTOR, column * FACTOR


@triton.jit
def _tile(
    token,
    side_h,
    side_w,
    num_channels,
    image_stride,
    patch_stride,
    FACTOR: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Positions of a square's numbers: offsets in x and in the square's row, and which are of the square (not past
    its end) and of the grid (not padding), all [BLOCK_PATCHES, BLOCK_CHANNELS]."""
    out_h, out_w = tl.cdiv(side_h, FACTOR), tl.cdiv(side_w, FACTOR)
    image, first_row, first_column = _square(token, out_h, out_w, FACTOR, ROW_MAJOR)
    patches, channels = tl.arange(0, BLOCK_PATCHES), tl.arange(0, BLOCK_CHANNELS)
    rows, columns = first_row + patches // FACTOR, first_column + patches % FACTOR
    of_square = (patches < FACTOR * FACTOR)[:, None] & (channels < num_channels)[None, :]
    of_grid = of_square & ((rows < side_h) & (columns < side_w))[:, None]
    in_x = image * image_stride + (rows * side_w + columns) * patch_stride
    in_row = patches * num_channels
    return in_x[:, None] + channels[None, :], in_row[:, None] + channels[None, :], of_square, of_grid


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    inverse_ptr,
    side_h,
    side_w,
    num_channels,
    image_stride,
    patch_stride,
    eps,
    FACTOR: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One square: y, mean and r."""
    token = tl.program_id(0).to(tl.int64)
    in_x, in_row, of_square, of_grid = _tile(
        token, side_h, side_w, num_channels, image_stride, patch_stride,
        FACTOR, ROW_MAJOR, BLOCK_PATCHES, BLOCK_CHANNELS,
    )  # fmt: skip
    num_columns = FACTOR * FACTOR * num_channels
    x = tl.load(x_ptr + in_x, mask=of_grid, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / num_columns
    centred = tl.where(of_square, x - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / num_columns + eps)
    weight = tl.load(weight_ptr + in_row, mask=of_square, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + in_row, mask=of_square, other=0.0).to(tl.float32)
    out = centred * inverse * weight + bias
    tl.store(out_ptr + token * num_columns + in_row, out.to(out_ptr.dtype.element_ty), mask=of_square)
    tl.store(mean_ptr + token, mean)
    tl.store(inverse_ptr + token, inverse)


@triton.jit
def _input_kernel(
    grad_out_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    inverse_ptr,
    grad_x_ptr,
    side_h,
    side_w,
    num_channels,
    image_stride,
    patch_stride,
    FACTOR: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One square's dx; grad_x is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    in_x, in_row, of_square, of_grid = _tile(
        token, side_h, side_w, num_channels, image_stride, patch_stride,
        FACTOR, ROW_MAJOR, BLOCK_PATCHES, BLOCK_CHANNELS,
    )  # fmt: skip
    in_grad_x, _, _, _ = _tile(
        token, side_h, side_w, num_channels, side_h * side_w * num_channels, num_channels,
        FACTOR, ROW_MAJOR, BLOCK_PATCHES, BLOCK_CHANNELS,
    )  # fmt: skip
    num_columns = FACTOR * FACTOR * num_channels
    mean, inverse = tl.load(mean_ptr + token), tl.load(inverse_ptr + token)
    x = tl.load(x_ptr + in_x, mask=of_grid, other=0.0).to(tl.float32)
    normed = tl.where(of_square, (x - mean) * inverse, 0.0)
    weight = tl.load(weight_ptr + in_row, mask=of_square, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + token * num_columns + in_row, mask=of_square, other=0.0).to(tl.float32)
    weighted = grad_out * weight
    mean_weighted = tl.sum(tl.sum(weighted, axis=1), axis=0) / num_columns
    mean_product = tl.sum(tl.sum(weighted * normed, axis=1), axis=0) / num_columns
    grad_x = (weighted - mean_weighted - normed * mean_product) * inverse
    tl.store(grad_x_ptr + in_grad_x, grad_x.to(grad_x_ptr.dtype.element_ty), mask=of_grid)


@triton.jit
def _weight_kernel(
    grad_out_ptr,
    x_ptr,
    mean_ptr,
    inverse_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    num_tokens,
    tokens_per_program,
    side_h,
    side_w,
    num_channels,
    image_stride,
    patch_stride,
    FACTOR: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One patch of the square and some of its channels (axis 0), a share of the squares (axis 1): partial dw and db."""
    channel_blocks = tl.cdiv(num_channels, BLOCK_CHANNELS)
    patch = tl.program_id(0) // channel_blocks
    channels = tl.program_id(0) % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_inside = channels < num_channels
    out_h, out_w = tl.cdiv(side_h, FACTOR), tl.cdiv(side_w, FACTOR)
    num_columns = FACTOR * FACTOR * num_channels
    in_row = patch * num_channels + channels
    grad_weight = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    first = tl.program_id(1) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, num_tokens)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        token_inside = tokens < last
        image, rows, columns = _square(tokens, out_h, out_w, FACTOR, ROW_MAJOR)
        rows, columns = rows + patch // FACTOR, columns + patch % FACTOR
        inside = token_inside[:, None] & channel_inside[None, :]
        of_grid = inside & ((rows < side_h) & (columns < side_w))[:, None]
        in_x = image * image_stride + (rows * side_w + columns) * patch_stride
        x = tl.load(x_ptr + in_x[:, None] + channels[None, :], mask=of_grid, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_out_ptr + (tokens * num_columns)[:, None] + in_row[None, :], mask=inside, other=0.0)
        grad_out = grad_out.to(tl.float32)
        mean = tl.load(mean_ptr + tokens, mask=token_inside, other=0.0)
        inverse = tl.load(inverse_ptr + tokens, mask=token_inside, other=0.0)
        grad_weight += tl.sum(grad_out * (x - mean[:, None]) * inverse[:, None], axis=0)
        grad_bias += tl.sum(grad_out, axis=0)
    at = tl.program_id(1).to(tl.int64) * num_columns + in_row
    tl.store(grad_weight_ptr + at, grad_weight, mask=channel_inside)
    tl.store(grad_bias_ptr + at, grad_bias, mask=channel_inside)


def _plan(num_channels: int, factor: int, row_major: bool) -> dict[str, Any]:
    """Tile and warps for a square: 32 numbers a thread where 16 warps allow."""
    elements = square_numbers(num_channels, factor)
    needed = f"{factor} x {factor} patches of {num_channels} channels, at most {MAX_SQUARE_NUMBERS} numbers"
    assert elements <= MAX_SQUARE_NUMBERS, needed
    return {
        "FACTOR": factor,
        "ROW_MAJOR": row_major,
        "BLOCK_PATCHES": triton.next_power_of_2(factor * factor),
        "BLOCK_CHANNELS": triton.next_power_of_2(num_channels),
        "num_warps": min(16, max(1, elements // 1024)),
    }


def _num_shares(num_tokens: int, num_column_programs: int, device: torch.device) -> int:
    """Number of shares of the squares in the second pass; two under the interpreter, to add partial sums too."""
    most = triton.cdiv(num_tokens, SUM_TOKENS)
    if device.type != "cuda":
        return min(most, 2)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(most, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, num_column_programs))


def forward(
    x: Tensor, sides: tuple[int, int], factor: int, row_major: bool, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, t, c], channels side by side; sides (h, w), h * w = t; weight, bias [k]
    -> y [n, squares, k], mean and r [n * squares] fp32."""
    num_channels = x.shape[2]
    num_squares = triton.cdiv(sides[0], factor) * triton.cdiv(sides[1], factor)
    shape = (x.shape[0], num_squares, factor * factor * num_channels)
    out = torch.empty(shape, dtype=stored_dtype(x.dtype), device=x.device)
    mean, inverse = (torch.empty(shape[0] * num_squares, dtype=torch.float32, device=x.device) for _ in range(2))
    if len(mean):
        _forward_kernel[(len(mean),)](
            x, weight, bias, out, mean, inverse, *sides, num_channels, x.stride(0), x.stride(1), eps,
            **_plan(num_channels, factor, row_major),
        )  # fmt: skip
    return out.to(x.dtype), mean, inverse


def input_gradient(
    grad_out: Tensor, x: Tensor, sides: tuple[int, int], factor: int, row_major: bool, weight: Tensor,
    mean: Tensor, inverse: Tensor,
) -> Tensor:  # fmt: skip
    """dy [n, squares, k] contiguous -> dx [n, t, c]."""
    grad_x = torch.empty(x.shape, dtype=stored_dtype(x.dtype), device=x.device)
    if len(mean):
        _input_kernel[(len(mean),)](
            grad_out, x, weight, mean, inverse, grad_x, *sides, x.shape[2], x.stride(0), x.stride(1),
            **_plan(x.shape[2], factor, row_major),
        )  # fmt: skip
    return grad_x.to(x.dtype)


def weight_gradients(
    grad_out: Tensor, x: Tensor, sides: tuple[int, int], factor: int, row_major: bool, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """dy [n, squares, k] contiguous -> dw, db [k], fp32."""
    num_tokens, num_channels = len(mean), x.shape[2]
    if not num_tokens:
        nothing = torch.zeros(grad_out.shape[-1], dtype=torch.float32, device=x.device)
        return nothing, nothing.clone()
    num_column_programs = factor * factor * triton.cdiv(num_channels, SUM_CHANNELS)
    num_shares = _num_shares(num_tokens, num_column_programs, x.device)
    tokens_per_program = triton.cdiv(triton.cdiv(num_tokens, num_shares), SUM_TOKENS) * SUM_TOKENS
    partial = torch.empty(2, num_shares, grad_out.shape[-1], dtype=torch.float32, device=x.device)
    _weight_kernel[(num_column_programs, num_shares)](
        grad_out, x, mean, inverse, partial[0], partial[1], num_tokens, tokens_per_program,
        *sides, num_channels, x.stride(0), x.stride(1),
        FACTOR=factor, ROW_MAJOR=row_major, BLOCK_TOKENS=SUM_TOKENS, BLOCK_CHANNELS=SUM_CHANNELS, num_warps=4,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(1)
    return grad_weight, grad_bias


class SpaceToDepthNorm(torch.autograd.Function):
    """(x [n, t, c], (h, w), factor, whether row by row, weight [k], bias [k], eps) -> y [n, squares, k]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sides: tuple[int, int], factor: int, row_major: bool, weight: Tensor, bias: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        if x.stride(2) != 1:
            x = x.contiguous()
        out, mean, inverse = forward(x, sides, factor, row_major, weight.contiguous(), bias.contiguous(), eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.how = (sides, factor, row_major)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        sides, factor, row_major = ctx.how
        grad_out = grad_out.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad_out, x, sides, factor, row_major, weight.contiguous(), mean, inverse)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            sums = weight_gradients(grad_out, x, sides, factor, row_major, mean, inverse)
            grad_weight, grad_bias = (total.to(weight.dtype) for total in sums)
        return grad_x, None, None, None, grad_weight, grad_bias, None
