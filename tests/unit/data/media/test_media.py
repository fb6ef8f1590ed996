"""Pixels are those of LLaVA's own preparation through `transformers`' CLIP processor, or of the tower's own one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from megatron_vlm.data.media.images import FAULTS, MediaReader
from megatron_vlm.data.sample import BadSample
from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from tests.helpers.faults import bad_media

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = MediaSpec(tokens_per_image=4, num_patches=4, height=28, width=28, mean=MEAN, std=STD)
PROCESSOR = CLIPImageProcessorPil(
    size={"height": 28, "width": 28}, do_center_crop=False, image_mean=MEAN, image_std=STD
)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def theirs(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(PROCESSOR(image)["pixel_values"][0]))


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (40, 20), (7, 100), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_resize_equals_transformers(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    image = noise(*size, mode)
    image.save(tmp_path / "a.png")
    pixels = MediaReader(SPEC, "resize").read(tmp_path / "a.png", "sample 's'")
    assert pixels.shape == (3, 28, 28) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels, theirs(image.convert("RGB")).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (41, 20), (20, 41)])
def test_pad_equals_expand_to_square(size: tuple[int, int]) -> None:
    width, height = size
    side, image = max(size), noise(*size)
    square = np.full((side, side, 3), [int(m * 255) for m in MEAN], np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    pixels = MediaReader(SPEC, "pad").prepare(image)
    torch.testing.assert_close(pixels, theirs(Image.fromarray(square)).float(), atol=1e-5, rtol=0)
    assert width == height or not torch.equal(pixels, MediaReader(SPEC, "resize").prepare(image))


def test_size_of_the_spec_is_height_then_width() -> None:
    spec = MediaSpec(4, 4, height=14, width=42, mean=MEAN, std=STD)
    assert MediaReader(spec, "resize").prepare(noise(30, 30)).shape == (3, 14, 42)


def test_blank_is_the_mean_colour_and_reads_nothing(tmp_path: Path) -> None:
    pixels = MediaReader(SPEC, "pad", blank=True).read(tmp_path / "none.png", "sample 's'")
    assert pixels.shape == (3, 28, 28) and pixels.abs().max() < 1 / 255 / min(STD)


def damaged(image: Image.Image, path: Path) -> None:
    image.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": 28}),
    "clip, old form": (CLIPImageProcessorPil, {"size": 28, "crop_size": 28, "do_convert_rgb": True}),
    "clip, larger edge": (CLIPImageProcessorPil, {"size": {"shortest_edge": 32}, "crop_size": 28, "resample": 2}),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 28, "width": 28}}),
    "not normalised": (SiglipImageProcessorPil, {"size": {"height": 28, "width": 28}, "do_normalize": False}),
    "not rescaled": (ViTImageProcessorPil, {"size": {"height": 28, "width": 28}, "do_rescale": False}),
}


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (41, 20), (20, 41)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_mode_is_the_towers_processor(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    class_, settings = PROCESSORS[name]
    settings = {"image_processor_type": class_.__name__.removesuffix("Pil"), "image_mean": MEAN, **settings}
    image = noise(*size)
    image.save(tmp_path / "a.png")
    reader = MediaReader(replace(SPEC, processor=json.dumps(settings)), "processor")
    pixels = reader.read(tmp_path / "a.png", "sample 's'")
    expected = torch.from_numpy(np.asarray(class_(**settings)(image)["pixel_values"][0])).float()
    assert pixels.dtype == torch.float32 and torch.equal(pixels, expected)
    if size[0] != size[1]:
        assert not torch.allclose(pixels, MediaReader(SPEC, "pad").prepare(image), atol=1e-3)
    assert reader.blank_pixels().shape == (3, 28, 28)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated png", "truncated jpg", "folder"])
def test_bad_files_name_sample_and_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("bad.jpg" if "jpg" in kind else "bad.png")
    if kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "no image")
    elif "truncated" in kind:
        damaged(noise(64, 64), path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=rf"sample 's': image .*{path.name} (does not exist|cannot be read)"):
        MediaReader(SPEC, "pad").read(path, "sample 's'")


def test_every_damaged_byte_is_an_error_or_an_image(tmp_path: Path) -> None:
    """Whatever is wrong inside a file, nothing but DataError comes out."""
    random = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.gif"):
        noise(20, 20).save(tmp_path / name)
        good = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[random.integers(len(bad), size=3)] = random.integers(256, size=3)
            (tmp_path / name).write_bytes(bad.tobytes())
            try:
                assert MediaReader(SPEC, "pad").read(tmp_path / name, "s").isfinite().all()
            except DataError as error:
                assert "\n" not in str(error)


def test_wide_grey_images_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28) * 83
    Image.fromarray(values).save(tmp_path / "wide.png")
    Image.fromarray((values / 257).round().astype(np.uint8)).save(tmp_path / "narrow.png")
    wide, narrow = (MediaReader(SPEC, "pad").read(tmp_path / f"{name}.png", "s") for name in ("wide", "narrow"))
    torch.testing.assert_close(wide, narrow, atol=0, rtol=0)
    assert wide.std() > 0.5


def test_images_without_a_known_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 28 * 28, dtype=np.float32).reshape(28, 28)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"sample 's': image .*a.tif cannot be read: its pixels are 32 bits wide"):
        MediaReader(SPEC, "pad").read(tmp_path / "a.tif", "sample 's'")


@pytest.mark.parametrize(
    ("spoiler", "reason", "in_header"),
    [
        (bad_media.missing, "missing", True),
        (bad_media.bomb, "bomb", True),
        (bad_media.not_an_image, "not an image", True),
        (bad_media.truncated, "damaged", False),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_what_is_wrong_is_told_by_name(tmp_path: Path, spoiler: Any, reason: str, in_header: bool, suffix: str) -> None:
    path, reader = tmp_path / f"bad.{suffix}", MediaReader(SPEC, "pad")
    spoiler(path)
    with pytest.raises(BadSample, match=f"^sample 's': image {path}") as caught:
        reader.read(path, "sample 's'")
    assert caught.value.reason == reason and reason in FAULTS and "\n" not in str(caught.value)
    if in_header:
        with pytest.raises(BadSample) as caught:
            reader.check_header(path, "sample 's'")
        assert caught.value.reason == reason
    else:
        reader.check_header(path, "sample 's'")


@pytest.mark.parametrize(
    ("width", "height", "refused_by"),
    [
        (9_400, 9_600, ("pad", "resize", "processor")),  # between Pillow's warning and its error
        (8_900, 8_900, ()),
        (60_000, 1_000, ("pad",)),  # its square has 3.6 thousand million pixels
        (16_000_000, 1, ("pad", "processor")),  # its short side is stretched to the tower's
        (80_000_000, 1, ("pad", "resize", "processor")),  # the weights of its resize take 2.6 GB
    ],
)
def test_how_large_an_image_may_be(tmp_path: Path, width: int, height: int, refused_by: tuple[str, ...]) -> None:
    """Headers alone: a photograph passes, whatever would fill the memory does not."""
    bad_media.bomb(tmp_path / "a.png", width, height)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28}
    spec = replace(SPEC, processor=json.dumps(settings))
    for mode in ("pad", "resize", "processor"):
        reader = MediaReader(spec, mode)
        if mode in refused_by:
            with pytest.raises(BadSample, match="is too large to be decoded: .*pixels") as caught:
                reader.check_header(tmp_path / "a.png", "s")
            assert caught.value.reason == "bomb"
        else:
            reader.check_header(tmp_path / "a.png", "s")
