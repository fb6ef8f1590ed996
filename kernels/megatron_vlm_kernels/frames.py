"""uint8 frames -> resized, tiled and normalised patches, in two passes as Pillow resizes 8-bit images.

    u[n, y, x, c] = clip((2^21 + sum over k of across[x, k] * frame[n, y, first_x[x] + k, c]) >> 22)          uint8
    v[n, y, x, c] = clip((2^21 + sum over k of down[y, k] * u[n, first_y[y] + k, x, c]) >> 22)                0..255
    out[n, tile, patch, c, py, px] = v * scale[c] + shift[c] at the window's pixel (y, x)

or with the passes the other way round (COLUMNS_FIRST), where u is kept with rows and columns exchanged. Sums are of
integers, so pixels are Pillow's to the last bit. The frame lies on a canvas of one colour, none of which is stored: in
the first pass it is what a load beside the frame gives; lines beside the frame resize to that same colour, since
weights sum to 1 but for rounding, and are not computed. The second pass writes patches where they belong; outside the
resized canvas the window has the fill colour.

n frames, k taps of the filter. A line is a row of the frame, or a column where COLUMNS_FIRST.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vlm_kernels.outputs import stored_dtype

WEIGHT_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)
BLOCK_LINES, BLOCK_PIXELS = 4, 256  # of the first pass
BLOCK = 1024  # of the second


@triton.jit
def _fill_of(channel, fill_r, fill_g, fill_b):
    return tl.where(channel == 0, fill_r, tl.where(channel == 1, fill_g, fill_b))


@triton.jit
def _rounded(total):
    return tl.minimum(tl.maximum(total >> WEIGHT_BITS, 0), 255)


@triton.jit
def _first_kernel(
    frames_ptr,
    first_ptr,
    weights_ptr,
    out_ptr,
    num_lines,
    lines_per_frame,
    length,
    frame_stride,
    line_stride,
    pixel_stride,
    before,
    out_length,
    num_taps,
    fill_r,
    fill_g,
    fill_b,
    BLOCK_LINES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Lines of `length` pixels -> [num_lines, out_length, 3]; the canvas begins `before` pixels before a line."""
    lines = tl.program_id(0).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    at = tl.program_id(1) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixels, channel = at // 3, at % 3
    line_inside, inside = lines < num_lines, at < out_length * 3
    starts = (lines // lines_per_frame) * frame_stride + (lines % lines_per_frame) * line_stride
    fill = _fill_of(channel, fill_r, fill_g, fill_b)
    first = tl.load(first_ptr + pixels, mask=inside, other=0) - before
    total = tl.full([BLOCK_LINES, BLOCK_PIXELS], HALF, dtype=tl.int32)
    for k in range(0, num_taps):
        weight = tl.load(weights_ptr + pixels * num_taps + k, mask=inside, other=0)
        source = first + k
        of_frame = inside & (source >= 0) & (source < length)
        offsets = starts[:, None] + (source * pixel_stride + channel)[None, :]
        pixel = tl.load(frames_ptr + offsets, mask=line_inside[:, None] & of_frame[None, :], other=0).to(tl.int32)
        total += tl.where(of_frame[None, :], pixel, fill[None, :]) * weight[None, :]
    offsets = lines[:, None] * (out_length * 3) + at[None, :]
    tl.store(out_ptr + offsets, _rounded(total).to(tl.uint8), mask=line_inside[:, None] & inside[None, :])


@triton.jit
def _second_kernel(
    lines_ptr,
    first_ptr,
    weights_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    num_lines,
    before,
    resized,
    length,
    window_top,
    window_left,
    num_taps,
    fill_r,
    fill_g,
    fill_b,
    COLUMNS_FIRST: tl.constexpr,
    WINDOW_HEIGHT: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes some of a frame's outputs (axis 0: which, axis 1: frame). lines [n, num_lines, length, 3] uint8; across
    the lines there will be `resized` pixels."""
    frame = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WINDOW_HEIGHT * WINDOW_WIDTH * 3
    # at = (tile row, tile column, patch row, patch column, channel, y in the patch, x in the patch), the last fastest
    in_patch_x, rest = at % PATCH_WIDTH, at // PATCH_WIDTH
    in_patch_y, rest = rest % PATCH_HEIGHT, rest // PATCH_HEIGHT
    channel, rest = rest % 3, rest // 3
    patch_x, rest = rest % (TILE_WIDTH // PATCH_WIDTH), rest // (TILE_WIDTH // PATCH_WIDTH)
    patch_y, rest = rest % (TILE_HEIGHT // PATCH_HEIGHT), rest // (TILE_HEIGHT // PATCH_HEIGHT)
    tile_x, tile_y = rest % (WINDOW_WIDTH // TILE_WIDTH), rest // (WINDOW_WIDTH // TILE_WIDTH)
    x = tile_x * TILE_WIDTH + patch_x * PATCH_WIDTH + in_patch_x + window_left
    y = tile_y * TILE_HEIGHT + patch_y * PATCH_HEIGHT + in_patch_y + window_top
    if COLUMNS_FIRST:
        across, along = x, y
    else:
        across, along = y, x
    of_canvas = inside & (across >= 0) & (across < resized) & (along >= 0) & (along < length)

    fill = _fill_of(channel, fill_r, fill_g, fill_b)
    first = tl.load(first_ptr + across, mask=of_canvas, other=0) - before
    total = tl.full([BLOCK], HALF, dtype=tl.int32)
    frame_lines = lines_ptr + frame * num_lines * length * 3
    for k in range(0, num_taps):
        weight = tl.load(weights_ptr + across * num_taps + k, mask=of_canvas, other=0)
        source = first + k
        of_frame = of_canvas & (source >= 0) & (source < num_lines)
        pixel = tl.load(frame_lines + (source * length + along) * 3 + channel, mask=of_frame, other=0).to(tl.int32)
        total += tl.where(of_frame, pixel, fill) * weight
    value = tl.where(of_canvas, _rounded(total), fill).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=inside, other=0.0)
    place = out_ptr + frame * (WINDOW_HEIGHT * WINDOW_WIDTH * 3) + at
    tl.store(place, (value * scale + shift).to(out_ptr.dtype.element_ty), mask=inside)


def resize_first(
    frames: Tensor, resampling: tuple[Tensor, Tensor], before: int, fill: tuple[int, int, int], columns_first: bool
) -> Tensor:
    """frames [n, h, w, 3] uint8 contiguous -> [n, h, w', 3] uint8, or [n, w, h', 3] where the columns are first.

    Args:
        resampling: first pixel [w'] and weights [w', k], int32, of a canvas that begins `before` pixels before a line.
    """
    first, weights = resampling
    num_frames, height, width, _ = frames.shape
    per_frame, length = (width, height) if columns_first else (height, width)
    strides = (3, 3 * width) if columns_first else (3 * width, 3)
    out = frames.new_empty(num_frames, per_frame, len(first), 3)
    num_lines = num_frames * per_frame
    if not num_lines:
        return out
    grid = (triton.cdiv(num_lines, BLOCK_LINES), triton.cdiv(len(first) * 3, BLOCK_PIXELS))
    _first_kernel[grid](
        frames, first, weights, out, num_lines, per_frame, length, 3 * height * width, *strides, before, len(first),
        weights.shape[1], *fill, BLOCK_LINES=BLOCK_LINES, BLOCK_PIXELS=BLOCK_PIXELS,
    )  # fmt: skip
    return out


def resize_second(
    lines: Tensor,
    resampling: tuple[Tensor, Tensor],
    normalise: tuple[Tensor, Tensor],
    places: tuple[int, int, int],
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    how: tuple[tuple[int, int, int], bool],
    dtype: torch.dtype,
) -> Tensor:
    """Resizes the result of `resize_first` -> [n, window height * window width * 3] of that dtype, patch by patch.

    Args:
        resampling: first line and weights, int32, of a canvas that begins `before` lines before the frame.
        normalise: scale and shift [3] fp32 of pixels in 0..255.
        places: `before`, and the window's first row and column in the resized canvas.
        sizes: (height, width) of window, tile and patch.
        how: fill colour, and whether the columns were first.
    """
    first, weights = resampling
    window, tile, patch = sizes
    num_numbers = window[0] * window[1] * 3
    out = torch.empty(lines.shape[0], num_numbers, dtype=stored_dtype(dtype), device=lines.device)
    if not len(out):
        return out.to(dtype)
    grid = (triton.cdiv(num_numbers, BLOCK), len(out))
    _second_kernel[grid](
        lines, first, weights, *normalise, out, lines.shape[1], places[0], len(first), lines.shape[2], *places[1:],
        weights.shape[1], *how[0], how[1], *window, *tile, *patch, BLOCK=BLOCK,
    )  # fmt: skip
    return out.to(dtype)
