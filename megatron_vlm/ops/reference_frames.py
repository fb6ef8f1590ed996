"""The plain twin of `ops.frames`, and the resampling weights that all its backends share: Pillow's, in integers.

Pillow resizes 8-bit images in two passes, along the rows and along the columns, and rounds to 8 bits after each, so
that their order shows: until Pillow 12 along the rows first, since 13 not where the height shrinks much more.
An output pixel is a weighted sum of the input pixels in the filter's support, which grows with the ratio where a
image shrinks (that is its antialiasing); the weights are normalised, rounded to 22 binary places, and summed in
integers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor

Filter = Literal["box", "bilinear", "hamming", "bicubic", "lanczos"]
Pair = tuple[int, int]
Colour = tuple[float, float, float]

WEIGHT_BITS = 22
HALF = 1 << (WEIGHT_BITS - 1)
MAX_RESAMPLINGS = 256  # kept: one per side of an image, and a data set may have as many sizes as images


@dataclass(frozen=True)
class FramePlan:
    """A frame's way to a tower's patches; every pair is (along the height, along the width), in pixels.

        frame -> on a canvas of the fill colour -> resized -> a window of it (fill outside) -> tiles -> patches

    Args:
        canvas: the frame is set on it; the frame's own size for none.
        frame_at: the frame's upper left corner on the canvas.
        resized: the canvas is resized to this.
        window: size of what is taken of it; may be larger.
        window_at: the window's upper left corner in it; negative where the window begins before it.
        tile: divides the window.
        patch: divides the tile; a patch as large as its tile gives a tower's `pixel_values`.
        fill: of 0..255 per channel, the canvas and what a window has outside.
        filter: of the resize, as Pillow's.
        mean, std: per channel, of values in 0..1.
        columns_first: whether the first pass is along the columns (`pillow_goes_down_first`).
    """

    canvas: Pair
    frame_at: Pair
    resized: Pair
    window: Pair
    window_at: Pair
    tile: Pair
    patch: Pair
    fill: tuple[int, int, int]
    filter: Filter
    mean: Colour
    std: Colour
    columns_first: bool = False

    def __post_init__(self) -> None:
        for window, tile, patch in zip(self.window, self.tile, self.patch, strict=True):
            assert window % tile == 0 and tile % patch == 0, f"{self.window} / {self.tile} / {self.patch}"

    @property
    def num_tiles(self) -> int:
        """Number of tiles of a frame, row by row."""
        return (self.window[0] // self.tile[0]) * (self.window[1] // self.tile[1])

    @property
    def num_patches(self) -> int:
        """Number of patches of a tile, row by row."""
        return (self.tile[0] // self.patch[0]) * (self.tile[1] // self.patch[1])


@cache
def _pillow_major() -> int:
    """Read from the package's files, which do not change while a process runs."""
    return int(version("pillow").partition(".")[0])


def pillow_goes_down_first(size: Pair, resized: Pair) -> bool:
    """Whether the Pillow installed here resizes along the columns first. Of Pillow 13 the rule was found by trying it:
    where the height shrinks, and by more than twice as many pixels as the width."""
    if _pillow_major() < 13:
        return False
    fewer = [before - after for before, after in zip(size, resized, strict=True)]
    return fewer[0] > max(0, 2 * fewer[1])


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0.0)


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * torch.cos(torch.pi * x)), 0.0)


def _lanczos(x: Tensor) -> Tensor:
    return torch.where((x >= -3) & (x < 3), torch.sinc(x) * torch.sinc(x / 3), 0.0)


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


@lru_cache(maxsize=MAX_RESAMPLINGS)
def resampling(num_in: int, num_out: int, filter: Filter) -> tuple[Tensor, Tensor]:
    """Pillow's weights of one pass, on the CPU.

    Returns:
        first [num_out] int32, the first input pixel of each output pixel, and weights [num_out, taps] int32 in units of
        2^-22, zero past the last input pixel.
    """
    function, support = FILTERS[filter]
    ratio = num_in / num_out
    stretch = max(ratio, 1.0)
    support *= stretch
    center = (torch.arange(num_out, dtype=torch.float64, device="cpu") + 0.5) * ratio
    first = (center - support + 0.5).trunc().clamp_min(0).long()
    last = (center + support + 0.5).trunc().clamp_max(num_in).long()
    tap = torch.arange(math.ceil(support) * 2 + 1, device="cpu")
    weights = function((tap + first[:, None] - center[:, None] + 0.5) / stretch)
    weights = torch.where(tap < (last - first)[:, None], weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True)
    scaled = weights * (1 << WEIGHT_BITS)
    whole = torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).trunc()
    return first.int(), whole.int()


def resize_pass(pixels: Tensor, dim: int, num_out: int, filter: Filter) -> Tensor:
    """uint8 pixels, one dimension resized as Pillow does it -> uint8."""
    num_in = pixels.shape[dim]
    first, weights = (x.to(pixels.device) for x in resampling(num_in, num_out, filter))
    tap = torch.arange(weights.shape[1], device=pixels.device)
    index = (first[:, None] + tap).clamp_max(num_in - 1)  # past the end: any pixel, its weight is 0
    total = torch.full((), HALF, dtype=torch.int64, device=pixels.device)
    along = [1] * pixels.dim()
    along[dim] = num_out
    for k in range(weights.shape[1]):
        taken = pixels.index_select(dim, index[:, k]).long()
        total = total + taken * weights[:, k].long().view(along)
    return (total >> WEIGHT_BITS).clamp(0, 255).to(torch.uint8)


def frames_to_patches(frames: Tensor, plan: FramePlan, dtype: torch.dtype) -> Tensor:
    """Step by step, each on whole images; see `ops.frames.frames_to_patches`."""
    num_frames, height, width, _ = frames.shape
    canvas = _filled(num_frames, plan.canvas, plan.fill, frames)
    top, left = plan.frame_at
    canvas[:, top : top + height, left : left + width] = frames
    resized = canvas
    for axis in (0, 1) if plan.columns_first else (1, 0):
        resized = resize_pass(resized, 1 + axis, plan.resized[axis], plan.filter)
    window = _filled(num_frames, plan.window, plan.fill, frames)
    top, left = (max(at, 0) for at in plan.window_at)
    to_top, to_left = (max(-at, 0) for at in plan.window_at)
    seen = resized[:, top : top + plan.window[0] - to_top, left : left + plan.window[1] - to_left]
    window[:, to_top : to_top + seen.shape[1], to_left : to_left + seen.shape[2]] = seen
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(channels, dtype=wide, device=frames.device) for channels in (plan.mean, plan.std))
    values = (window.to(wide) / 255 - mean) / std
    # [n, H, W, 3] -> [n, tile rows, patch rows, patch height, tile columns, patch columns, patch width, 3]
    for dim, axis in ((2, 1), (1, 0)):
        values = values.unflatten(dim, (-1, plan.tile[axis] // plan.patch[axis], plan.patch[axis]))
    values = values.permute(0, 1, 4, 2, 5, 7, 3, 6)  # -> [n, tile (2), patch (2), 3, patch height, patch width]
    return values.flatten(5).flatten(3, 4).flatten(1, 2).to(dtype)


def _filled(num_frames: int, size: Pair, fill: tuple[int, int, int], like: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] of one colour."""
    colour = torch.tensor(fill, dtype=torch.uint8, device=like.device)
    return colour.expand(num_frames, *size, 3).clone()
