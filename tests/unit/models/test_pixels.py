"""Image modes `pad` and `resize` follow a tower's preprocessor config, or refuse what they cannot follow, by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BitImageProcessorPil, CLIPVisionConfig

from megatron_vlm.config.schema import VisionConfig
from megatron_vlm.data.media.images import MediaReader, pad_to_square
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images
from megatron_vlm.data.sample import Frame
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.pixels import as_it_was, plain_settings, write_pixel_format
from megatron_vlm.models.vision.preprocessing import pixel_format
from megatron_vlm.models.vision.survey import read_tower, survey_tower
from tests.helpers.data.videos import make_video
from tests.unit.models.recipes import SMALL_TOWER, small_tower

WHOLE = {"height": 28, "width": 28}
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
IMAGE = Image.fromarray(np.random.default_rng(11).integers(0, 256, (61, 83, 3), dtype=np.uint8))
TOWERS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 28}, "crop_size": WHOLE, "do_center_crop": True},
    "SiglipImageProcessor": {"size": WHOLE},
    "ViTImageProcessor": {"size": WHOLE},
    "BitImageProcessor": {"size": {"shortest_edge": 28}, "crop_size": WHOLE, "do_center_crop": True},  # as DINOv2's
    "DeiTImageProcessor": {"size": WHOLE, "crop_size": WHOLE, "do_center_crop": True, "image_std": [0.1, 0.2, 0.3]},
}


def tower(folder: Path, settings: dict[str, Any]) -> Path:
    CLIPVisionConfig(**SMALL_TOWER).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def spec_of(folder: Path, **vision: Any) -> MediaSpec:
    return survey_tower(VisionConfig(path=str(folder), **vision), None).media_spec


def by_class(settings: dict[str, Any], image: Image.Image) -> torch.Tensor:
    """What transformers makes of it, with the same geometry as mode `resize`."""
    class_ = getattr(transformers, settings["image_processor_type"] + "Pil")
    processor = class_.from_dict({**settings, "size": WHOLE, "do_center_crop": False})
    return torch.from_numpy(np.asarray(processor(image)["pixel_values"][0], dtype=np.float32))


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("code", FILTERS)
def test_the_pixels_are_those_of_the_towers_filter(name: str, code: int, tmp_path: Path) -> None:
    settings = {"image_processor_type": name, "resample": code, **TOWERS[name]}
    spec = spec_of(tower(tmp_path, settings))
    resized, padded = (MediaReader(spec, mode).prepare(IMAGE) for mode in ("resize", "pad"))
    square = pad_to_square(IMAGE, tuple(int(mean * 255) for mean in spec.mean))
    torch.testing.assert_close(resized, by_class(settings, IMAGE), atol=1e-5, rtol=0)
    torch.testing.assert_close(padded, by_class(settings, square), atol=1e-5, rtol=0)
    theirs = getattr(transformers, name + "Pil").from_dict(settings)(square)["pixel_values"][0]
    torch.testing.assert_close(padded, torch.from_numpy(np.asarray(theirs)).float(), atol=1e-5, rtol=0)
    if FILTERS[code] != "bicubic":
        assert (resized - by_class({**settings, "resample": 3}, IMAGE)).abs().max() > 0.02, "the filter shows"


def test_a_key_that_a_config_lacks_is_its_class_s(tmp_path: Path) -> None:
    """ViT's class is bilinear and has means of its own, whatever the tower's type."""
    settings = {"image_processor_type": "ViTImageProcessor", "size": 28}
    spec = spec_of(tower(tmp_path, settings))
    assert spec.resample == Image.Resampling.BILINEAR and spec.mean == (0.5, 0.5, 0.5)
    pixels = MediaReader(spec, "resize").prepare(IMAGE)
    torch.testing.assert_close(pixels, by_class(settings, IMAGE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("code", [99, -1, "bicubic", True, 2.0, [3], None])
def test_a_filter_that_nobody_knows_is_told(code: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.vision: resample .* needs one of 0 \(nearest\), 1 \(lanczos\), 2 "):
        spec_of(tower(tmp_path, {"size": 28, "resample": code}))


CLIP = {"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28}
UNFOLLOWED: list[tuple[dict[str, Any], str]] = [
    ({**CLIP, "do_rescale": False}, "do_rescale false"),
    ({**CLIP, "do_normalize": False, "do_resize": False}, "do_resize false; do_normalize false"),
    ({**CLIP, "rescale_factor": 1 / 127.5}, "rescale_factor 0.0078.* and not 1/255"),
    ({**CLIP, "size": {"shortest_edge": 32}, "do_center_crop": True}, "crop_size 28 of size {'shortest_edge': 32}"),
    ({**CLIP, "size": [32, 30], "do_center_crop": True}, r"crop_size 28 of size \[32, 30\]"),
    ({"image_processor_type": "DonutImageProcessor", "size": WHOLE}, "do_pad true"),
    (
        {"image_processor_type": "MobileViTImageProcessor", "size": WHOLE, "crop_size": WHOLE},
        "settings by which MobileViTImageProcessor makes other pixels of an image of 56 x 56, off by",
    ),
    (
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}, "crop_pct": 0.7},
        "settings by which ConvNextImageProcessor makes other pixels",
    ),
]


@pytest.mark.parametrize("mode", ["pad", "resize"])
@pytest.mark.parametrize(("settings", "message"), UNFOLLOWED)
def test_what_a_mode_cannot_follow_is_refused_by_name(
    settings: dict[str, Any], message: str, mode: Any, tmp_path: Path
) -> None:
    spec = spec_of(tower(tmp_path, settings))
    with pytest.raises(ConfigError, match=f"^data.image_mode: found {mode}, but the tower's .* has {message}") as told:
        MediaReader(spec, mode)
    assert "\n" not in str(told.value) and "model.vision.preprocessor" in str(told.value)


def test_a_recipe_may_say_otherwise(tmp_path: Path) -> None:
    """A crop is given up, by its name; and the filter of a tower without a config is chosen."""
    tower(tmp_path, {**CLIP, "size": {"shortest_edge": 32}, "do_center_crop": True, "resample": 4})
    spec = spec_of(tmp_path, preprocessor={"size": 28, "do_center_crop": False, "resample": 2})
    expected = by_class({**CLIP, "resample": 2}, IMAGE)
    torch.testing.assert_close(MediaReader(spec, "resize").prepare(IMAGE), expected, atol=1e-5, rtol=0)
    write_pixel_format(tmp_path, spec, "resize")
    assert spec_of(tmp_path) == spec
    vision = VisionConfig(config=small_tower("siglip_vision_model"), preprocessor={"resample": 5})
    assert survey_tower(vision, None).media_spec.resample == Image.Resampling.HAMMING
    with pytest.raises(ConfigError, match="the key 'resampel', did you mean 'resample'"):
        spec_of(tmp_path, preprocessor={"resampel": 2})
    with pytest.raises(ConfigError, match=r"model\.vision\.preprocessor: rescale_factor is nan"):
        spec_of(tmp_path, preprocessor={"rescale_factor": float("nan")})


def test_a_config_that_was_made_up_gives_way_to_the_mode(tmp_path: Path) -> None:
    """DINOv2's usual crop is not what `pad` does; what was trained is what a checkpoint keeps."""
    survey = survey_tower(VisionConfig(config=small_tower("dinov2")), None)
    square = pad_to_square(IMAGE, tuple(int(mean * 255) for mean in survey.media_spec.mean))
    whole = BitImageProcessorPil(
        size=WHOLE, do_center_crop=False, image_mean=survey.media_spec.mean, image_std=survey.media_spec.std
    )
    expected = torch.from_numpy(np.asarray(whole(square)["pixel_values"][0])).float()
    torch.testing.assert_close(MediaReader(survey.media_spec, "pad").prepare(IMAGE), expected, atol=1e-5, rtol=0)
    survey.hf_config.save_pretrained(tmp_path)
    write_pixel_format(tmp_path, survey.media_spec, "pad")
    for mode in ("pad", "processor"):
        pixels = MediaReader(spec_of(tmp_path), mode).prepare(square)
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["recipe", "file"])
@pytest.mark.parametrize("mode", ["pad", "resize"])
def test_a_geometry_that_nobody_stated_is_the_mode_s(where: str, mode: Any, tmp_path: Path) -> None:
    """Other keys are followed all the same, or refused; a crop that somebody states is."""

    def of(folder: str, **stated: Any) -> MediaSpec:
        if where == "recipe":
            return survey_tower(VisionConfig(config=small_tower("dinov2"), preprocessor=stated), None).media_spec
        return spec_of(tower(tmp_path / folder, {"image_processor_type": "BitImageProcessor", **stated}))

    spec = of("a", resample=2, image_std=[0.2, 0.3, 0.4])
    pixels = MediaReader(spec, mode).prepare(IMAGE)
    image = IMAGE if mode == "resize" else pad_to_square(IMAGE, tuple(int(mean * 255) for mean in spec.mean))
    whole = BitImageProcessorPil(
        size=WHOLE, do_center_crop=False, image_mean=spec.mean, image_std=[0.2, 0.3, 0.4], resample=2
    )
    expected = torch.from_numpy(np.asarray(whole(image)["pixel_values"][0])).float()
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    CLIPVisionConfig(**SMALL_TOWER).save_pretrained(tmp_path / "saved")
    write_pixel_format(tmp_path / "saved", spec, mode)
    for again in (mode, "processor"):
        torch.testing.assert_close(
            MediaReader(spec_of(tmp_path / "saved"), again).prepare(image), expected, atol=1e-5, rtol=0
        )
    for name, stated, told in (
        ("b", {"do_rescale": False}, "do_rescale false"),
        ("c", {"do_pad": True}, "do_pad true"),
        ("d", {"do_center_crop": True, "size": {"shortest_edge": 30}, "crop_size": 28}, "crop_size 28 of size"),
    ):
        with pytest.raises(ConfigError, match=f"^data.image_mode: found {mode}, .* has {told}"):
            MediaReader(of(name, **stated), mode)


@pytest.mark.parametrize("mode", ["pad", "resize"])
@pytest.mark.parametrize(
    ("name", "size"),
    [("ConvNextImageProcessor", WHOLE), ("DPTImageProcessor", {"shortest_edge": 28}), ("ImageGPTImageProcessor", 28)],
)
def test_settings_that_their_own_class_refuses_are_told(name: str, size: Any, mode: Any, tmp_path: Path) -> None:
    spec = spec_of(tower(tmp_path, {"image_processor_type": name, "size": size}))
    with pytest.raises(
        ConfigError, match=f"^data.image_mode: found {mode}, .*{name}Pil refuses its own .*; needs other"
    ):
        MediaReader(spec, mode)


def test_checkpoints_from_before_are_read_as_they_were_trained(tmp_path: Path) -> None:
    bicubic = {"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28, "resample": 3}
    assert as_it_was(read_tower(VisionConfig(path=str(tower(tmp_path, bicubic)))), "pad") is None
    for differs in (
        {"resample": 2},
        {"resample": "cubic"},
        {"do_rescale": False},
        {"size": 40, "do_center_crop": True},
    ):
        path = str(tower(tmp_path, {**bicubic, **differs, "image_mean": [0.1, 0.2, 0.3]}))
        kept = read_tower(VisionConfig(path=path))
        assert as_it_was(kept, "processor") is None
        then = as_it_was(kept, "pad")
        assert then is not None
        pixels = pixel_format(kept, then)
        assert (pixels.height, pixels.resample, pixels.mean) == (28, Image.Resampling.BICUBIC, (0.1, 0.2, 0.3))
        MediaReader(MediaSpec(4, 4, **vars(pixels)), "pad")
        assert json.loads(pixels.processor).items() >= plain_settings(pixels).items()


def test_frames_of_videos_have_the_towers_filter(tmp_path: Path) -> None:
    """Of a container and of a folder of images; the video tells the same image for both."""
    settings = {"image_processor_type": "SiglipImageProcessor", "size": WHOLE, "resample": 4}
    spec = spec_of(tower(tmp_path / "tower", settings))
    make_video(tmp_path / "a.mp4", 4, g="2", crf="1")
    frames = [Frame("a.mp4", number, 4) for number in range(4)]

    class Seen(MediaReader):
        def prepare(self, image: Image.Image) -> torch.Tensor:
            seen.append(image)
            return super().prepare(image)

    seen: list[Image.Image] = []
    pixels = list(read_images(Seen(spec, "resize"), frames, MediaStore(tmp_path), "sample 's'"))
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(list(seen)):
        image.save(tmp_path / "folder" / f"{number}.png")
    frames = [Frame("folder", number, 4) for number in range(4)]
    again = read_images(MediaReader(spec, "resize"), frames, MediaStore(tmp_path), "sample 's'")
    for image, of_video, of_folder in zip(list(seen), pixels, again, strict=True):
        torch.testing.assert_close(of_video, by_class(settings, image), atol=1e-5, rtol=0)
        assert torch.equal(of_video, of_folder)
    assert (pixels[3] - by_class({**settings, "resample": 3}, seen[3])).abs().max() > 0.02
