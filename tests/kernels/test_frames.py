"""Frames to patches: Pillow's own pixels from the twin and the kernels, and transformers' processors."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.ops import reference_frames
from megatron_vlm.ops.frames import crop_plan, frames_to_patches, pad_plan, resize_plan
from megatron_vlm.ops.reference_frames import FramePlan, pillow_goes_down_first, resize_pass

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
FILTERS = {name: Image.Resampling[name.upper()] for name in reference_frames.FILTERS}
BACKENDS = ["reference", "triton"]
TOLERANCE = 1 / 255 / max(STD) / 2  # half of the 1/255 that is allowed before normalisation


def frames(num, height, width, seed=0):
    """Noise, and a block with hard edges, which cubic weights overshoot."""
    pixels = torch.randint(0, 256, (num, height, width, 3), generator=torch.Generator().manual_seed(seed))
    pixels[:, : height // 2, : width // 2] = torch.tensor([255, 0, 255])
    return pixels.to(torch.uint8)


def as_pixels(patches, plan):
    """[n, 1, 1, 3 * H * W] -> [n, 3, H, W]."""
    return patches.view(len(patches), 3, *plan.window)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("sizes", [((7, 9), (5, 4)), ((5, 4), (11, 13)), ((40, 3), (3, 40)), ((6, 6), (6, 3))], ids=str)
def test_the_twin_s_pixels_are_pillow_s(sizes, filter):
    before, after = sizes
    (pixels,) = frames(1, *before)
    pillow = Image.fromarray(pixels.numpy()).resize((after[1], after[0]), FILTERS[filter])
    for axis in (0, 1) if pillow_goes_down_first(before, after) else (1, 0):
        pixels = resize_pass(pixels, axis, after[axis], filter)
    assert np.array_equal(pixels.numpy(), np.asarray(pillow))


def test_the_order_of_the_passes_is_pillow_s():
    """Of Pillow 13: at, and beside, the border of its rule; the planted fault is the other order."""
    for height, width in ((10, 17), (11, 17), (12, 17), (13, 20), (25, 17), (24, 30), (9, 12)):
        before, after = (24, 24), (height, width)
        (pixels,) = frames(1, *before)
        pillow = np.asarray(Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC))
        down = pillow_goes_down_first(before, after)
        found = {}
        for name, order in {True: (0, 1), False: (1, 0)}.items():
            ours = pixels
            for axis in order:
                ours = resize_pass(ours, axis, after[axis], "bicubic")
            found[name] = np.array_equal(ours.numpy(), pillow)
        assert found[down]
        assert not found[not down] or height == 24


PLANS = {
    "resize": resize_plan((9, 14), (8, 6), MEAN, STD, patch=(4, 2)),
    "bilinear": resize_plan((9, 14), (12, 4), MEAN, STD, patch=(2, 2), filter="bilinear"),
    "pad": pad_plan((9, 4), (6, 6), MEAN, STD, patch=(2, 3)),
    "crop": crop_plan((9, 14), 8, (6, 6), MEAN, STD, patch=(3, 3)),
    "crop too much": crop_plan((9, 14), 5, (8, 8), MEAN, STD),
    "tiles": dataclasses.replace(
        resize_plan((9, 14), (8, 12), MEAN, STD), window=(8, 12), tile=(4, 4), patch=(2, 2), filter="bilinear"
    ),
    "all of it": FramePlan(
        (20, 18), (6, 1), (13, 11), (16, 12), (-2, -1), (8, 4), (4, 2), (1, 20, 255), "bicubic", MEAN, STD
    ),
    "columns first": FramePlan(
        (20, 18), (6, 1), (5, 22), (8, 20), (-2, 1), (4, 4), (2, 4), (1, 20, 255), "bicubic", MEAN, STD, True
    ),
}


def size_of(name):
    return (9, 4) if name == "pad" else (9, 14)


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in PLANS), ("all of it", torch.bfloat16)])
def test_the_kernels_give_what_the_twin_gives(name, dtype, device):
    plan, pixels = PLANS[name], frames(2, *size_of(name)).to(device)
    ours = frames_to_patches(pixels, plan, dtype, backend="triton")
    twin = frames_to_patches(pixels, plan, dtype, backend="reference")
    assert ours.dtype == dtype and ours.shape == (
        2,
        plan.num_tiles,
        plan.num_patches,
        3 * plan.patch[0] * plan.patch[1],
    )
    step = 2**-7 if dtype == torch.bfloat16 else 1e-6  # of rounding, so of one pixel: never of the 8-bit values
    torch.testing.assert_close(ours, twin, rtol=step, atol=1e-6)


CHANGES = (
    {"filter": "bilinear"},
    {"columns_first": True},
    {"window_at": (0, 0)},
    {"frame_at": (5, 1)},
    {"fill": (1, 20, 200)},
    {"tile": (16, 12)},
    {"patch": (2, 4)},
    {"mean": (0.48, 0.46, 0.42)},
)


def test_another_plan_is_found(device):
    """The kernel told another plan than the twin, in each of its parts."""
    plan, pixels = PLANS["all of it"], frames(2, 9, 14).to(device)
    ours = frames_to_patches(pixels, plan, torch.float32, backend="triton").flatten()
    for change in CHANGES:
        twin = frames_to_patches(pixels, dataclasses.replace(plan, **change), torch.float32, backend="reference")
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours, twin.flatten(), rtol=1e-6, atol=1e-6)


def test_weights_that_sum_to_less_than_one_are_found(device, monkeypatch):
    """The planted fault: a 256th less in every weight."""
    from megatron_vlm.ops import frames as door

    right = door.resampling

    def wrong(*arguments):
        first, weights = right(*arguments)
        return first, weights - 2**14 * (weights != 0).int()

    monkeypatch.setattr(door, "resampling", wrong)
    plan, pixels = PLANS["resize"], frames(2, 9, 14).to(device)
    ours = frames_to_patches(pixels, plan, torch.float32, backend="triton")
    twin = frames_to_patches(pixels, plan, torch.float32, backend="reference")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(20, 31), (33, 14)], ids=str)
def test_equals_transformers_processors(size, backend, device):
    (pixels,) = frames(1, *size)
    image = Image.fromarray(pixels.numpy())
    settings = {"image_mean": MEAN, "image_std": STD, "resample": Image.Resampling.BICUBIC}
    clip = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 14, "width": 14}, **settings)
    siglip = SiglipImageProcessorPil(size={"height": 12, "width": 16}, **settings)
    for processor, plan in (
        (clip, crop_plan(size, 16, (14, 14), MEAN, STD)),
        (siglip, resize_plan(size, (12, 16), MEAN, STD)),
    ):
        theirs = torch.from_numpy(np.array(processor(image)["pixel_values"][0])).float()
        ours = frames_to_patches(pixels[None].to(device), plan, torch.float32, backend=backend)
        error = (as_pixels(ours, plan)[0].cpu() - theirs).abs().max()
        assert error < TOLERANCE, f"{type(processor).__name__}: {error}"
        assert error < 1e-5, "the 8-bit pixels are the same, and so only the arithmetic of the norm differs"


@pytest.mark.parametrize("mode", ["pad", "resize"])
def test_equals_how_images_are_read(mode, device):
    """`data.media` prepares images from files; frames must come out alike."""
    (pixels,) = frames(1, 20, 31)
    reader = MediaReader(MediaSpec(16, 16, 12, 12, MEAN, STD), mode)
    plan = {"pad": pad_plan, "resize": resize_plan}[mode]((20, 31), (12, 12), MEAN, STD)
    ours = frames_to_patches(pixels[None].to(device), plan, torch.float32, backend="triton")
    theirs = reader.prepare(Image.fromarray(pixels.numpy()))
    torch.testing.assert_close(as_pixels(ours, plan)[0].cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_patches_times_a_convolution_s_weight_are_the_convolution(device):
    plan = PLANS["resize"]
    pixels = frames(2, 9, 14).to(device)
    patches = frames_to_patches(pixels, plan, torch.float32, backend="triton")
    whole = dataclasses.replace(plan, patch=plan.tile)
    images = as_pixels(frames_to_patches(pixels, whole, torch.float32, backend="triton"), whole)
    weight = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0)).to(device)
    expected = torch.nn.functional.conv2d(images, weight, stride=(4, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches[:, 0] @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


def test_no_frames(device):
    plan = PLANS["resize"]
    for backend in BACKENDS:
        nothing = frames_to_patches(frames(1, 9, 14)[:0].to(device), plan, torch.bfloat16, backend=backend)
        assert nothing.shape == (0, 1, 6, 24) and nothing.dtype == torch.bfloat16


def test_what_is_kept_between_calls_is_bounded(monkeypatch):
    """Images of many sizes; and the package's version is read once."""
    asked = []
    reference_frames._pillow_major.cache_clear()
    monkeypatch.setattr(reference_frames, "version", lambda name: asked.append(name) or "13.1")
    for height in range(300, 303):
        reference_frames.pillow_goes_down_first((height, 20), (10, 10))
    reference_frames._pillow_major.cache_clear()
    assert asked == ["pillow"]
    for size in range(1, reference_frames.MAX_RESAMPLINGS + 20):
        reference_frames.resampling(size, 2, "bilinear")
    assert reference_frames.resampling.cache_info().currsize == reference_frames.MAX_RESAMPLINGS
