"""Decoded frames -> a tower's patches where they were decoded: resize, pad, tile, normalise. Forward only.

* triton     two kernels: Pillow's first pass to uint8, then its second one, normalisation and patch layout in one
* reference  the plain twin, `reference_frames`, on whole images; any device

No run uses it yet: training decodes and resizes with Pillow in its data workers, and this comes with decoding on a GPU.
Both give Pillow's pixels, and so those of transformers' `...ImageProcessorPil` before they are normalised, to the bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vlm.ops import reference_frames
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection, triton_obstacle
from megatron_vlm.ops.reference_frames import (
    Colour,
    Filter,
    FramePlan,
    Pair,
    pillow_goes_down_first,
    resampling,
)

FRAMES: Operation[Callable[[Tensor, FramePlan, torch.dtype], Tensor]] = Operation("ops.frames")


def frames_to_patches(frames: Tensor, plan: FramePlan, dtype: torch.dtype, *, backend: str = AUTO) -> Tensor:
    """Frames of one size -> patches, tiles and patches row by row.

    Args:
        frames: [n, h, w, 3] uint8, n may be 0.
        plan: what is done to each.
        dtype: of the patches; bf16 or fp32.
        backend: auto | triton | reference.

    Returns:
        [n, tiles, patches, 3 * patch height * patch width], a patch as a convolution's weight has it: channel, row,
        column. With a patch as large as a tile, `.view(-1, 3, *plan.tile)` is a tower's `pixel_values`.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    assert frames.dtype == torch.uint8 and frames.shape[3] == 3, f"frames {frames.dtype} {tuple(frames.shape)}"
    for at, size, canvas in zip(plan.frame_at, frames.shape[1:3], plan.canvas, strict=True):
        assert at >= 0 and at + size <= canvas, f"frames {frames.shape[1:3]} at {plan.frame_at} of {plan.canvas}"
    return FRAMES.select(backend, frames)(frames, plan, dtype)


def resize_plan(
    frame: Pair, size: Pair, mean: Colour, std: Colour, *, patch: Pair | None = None, filter: Filter = "bicubic"
) -> FramePlan:
    """The frame's aspect ratio is let go: image mode `resize`, and SigLIP's processor.

    Args:
        frame, size: (height, width) of the frame and of the tower's pixels.
        patch: default: the whole image, `pixel_values`.
    """
    patch, down = patch or size, pillow_goes_down_first(frame, size)
    return FramePlan(frame, (0, 0), size, size, (0, 0), size, patch, (0, 0, 0), filter, mean, std, down)


def pad_plan(
    frame: Pair, size: Pair, mean: Colour, std: Colour, *, patch: Pair | None = None, filter: Filter = "bicubic"
) -> FramePlan:
    """The frame is centred on a square of the mean colour first: image mode `pad`, LLaVA's expand2square."""
    side, patch = max(frame), patch or size
    frame_at = ((side - frame[0]) // 2, (side - frame[1]) // 2)
    red, green, blue = (int(channel * 255) for channel in mean)
    fill = (red, green, blue)
    down = pillow_goes_down_first((side, side), size)
    return FramePlan((side, side), frame_at, size, size, (0, 0), size, patch, fill, filter, mean, std, down)


def crop_plan(
    frame: Pair,
    shortest_edge: int,
    size: Pair,
    mean: Colour,
    std: Colour,
    *,
    patch: Pair | None = None,
    filter: Filter = "bicubic",
) -> FramePlan:
    """The frame's shorter side is resized to `shortest_edge`, and its middle cut out: CLIP's processor. What the cut
    has outside the frame is black."""
    height, width = frame
    if height <= width:
        resized = (shortest_edge, int(shortest_edge * width / height))
    else:
        resized = (int(shortest_edge * height / width), shortest_edge)
    window_at = ((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2)
    patch, down = patch or size, pillow_goes_down_first(frame, resized)
    return FramePlan(frame, (0, 0), resized, size, window_at, size, patch, (0, 0, 0), filter, mean, std, down)


def _weights(plan: FramePlan, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, weights = resampling(plan.canvas[axis], plan.resized[axis], plan.filter)
    return first.to(device, non_blocking=True), weights.to(device, non_blocking=True)


@FRAMES.backend(TRITON, triton_obstacle, interpreter_objection)
def _frames_triton(frames: Tensor, plan: FramePlan, dtype: torch.dtype) -> Tensor:
    from megatron_vlm_kernels.frames import resize_first, resize_second

    device = frames.device
    first, second = (0, 1) if plan.columns_first else (1, 0)
    between = resize_first(
        frames.contiguous(), _weights(plan, first, device), plan.frame_at[first], plan.fill, plan.columns_first
    )
    scale = torch.tensor([1 / (255 * std) for std in plan.std])
    shift = torch.tensor([-mean / std for mean, std in zip(plan.mean, plan.std, strict=True)])
    out = resize_second(
        between,
        _weights(plan, second, device),
        (scale.to(device), shift.to(device)),
        (plan.frame_at[second], *plan.window_at),
        (plan.window, plan.tile, plan.patch),
        (plan.fill, plan.columns_first),
        dtype,
    )
    return out.view(len(frames), plan.num_tiles, plan.num_patches, 3 * plan.patch[0] * plan.patch[1])


FRAMES.backend("reference")(reference_frames.frames_to_patches)
