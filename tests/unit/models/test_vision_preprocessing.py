"""Preprocessor configs: read, made up where there is none, kept in checkpoints, and run by transformers' classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from megatron_vlm.config.schema import VisionConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.pixels import write_pixel_format
from megatron_vlm.models.vision.preprocessing import load_processor
from megatron_vlm.models.vision.survey import survey_tower
from tests.unit.models.recipes import SMALL_TOWER, small_tower

IMAGE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (45, 70, 3), dtype=np.uint8))
SQUARE = {"height": 28, "width": 28}


def pixels(processor: Any) -> np.ndarray:
    return np.asarray(processor(IMAGE)["pixel_values"][0])


def spec_at(path: Path) -> MediaSpec:
    return survey_tower(VisionConfig(path=str(path)), None).media_spec


def tower_with(path: Path, settings: dict[str, Any]) -> Path:
    """A CLIP tower's directory with a preprocessor config."""
    CLIPVisionConfig(**SMALL_TOWER).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("model_type", "usual"),
    [
        ("clip_vision_model", CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)),
        ("siglip_vision_model", SiglipImageProcessorPil(size=SQUARE)),
        ("vit", ViTImageProcessorPil(size=SQUARE, resample=3)),
        (
            "dinov2",
            BitImageProcessorPil(
                size={"shortest_edge": 32},
                crop_size=SQUARE,
                image_mean=[0.485, 0.456, 0.406],
                image_std=[0.229, 0.224, 0.225],
            ),
        ),
    ],
)
def test_a_tower_without_a_config_gets_its_types_usual_one(model_type: str, usual: Any, tmp_path: Path) -> None:
    """And a checkpoint made from it gives the same pixels."""
    survey = survey_tower(VisionConfig(config=small_tower(model_type)), None)
    made = pixels(load_processor(survey.media_spec))
    assert made.shape == (3, 28, 28) and np.array_equal(made, pixels(usual))
    survey.hf_config.save_pretrained(tmp_path)
    write_pixel_format(tmp_path, survey.media_spec, "processor")
    assert spec_at(tmp_path) == survey.media_spec
    assert np.array_equal(made, pixels(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")))


@pytest.mark.parametrize(
    "settings",
    [
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 30},
            "crop_size": SQUARE,
            "resample": 2,
        },
        {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 28}, "crop_size": SQUARE},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "image_mean": [0.1, 0.2, 0.3]},
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_normalize": False},
    ],
)
def test_a_towers_own_config_survives_a_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"do_center_crop": "crop_size" in settings, **settings}
    tower = tower_with(tmp_path / "tower", settings)
    expected = pixels(AutoImageProcessor.from_pretrained(tower, backend="pil"))
    spec = spec_at(tower)
    assert np.array_equal(pixels(load_processor(spec)), expected)
    checkpoint = tower_with(tmp_path / "checkpoint", {})
    write_pixel_format(checkpoint, spec, "processor")
    assert spec_at(checkpoint) == spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "NoSuchProcessor", "size": 28}, "NoSuchProcessor has no form for Pillow"),
        (
            {"size": {"shortest_edge": 28}, "do_center_crop": False},
            r"makes pixels \(3, 28, 56\) of an image of 63 x 31; the tower takes \(3, 28, 28\) of every one",
        ),
        ({"size": {"width": 28}, "crop_size": SQUARE, "do_center_crop": True}, "CLIPImageProcessor refuses its own"),
    ],
)
def test_processors_that_cannot_be_used(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """They are told when they are asked for: other image modes work without."""
    spec = spec_at(tower_with(tmp_path, settings))
    with pytest.raises(ConfigError, match=f"^data.image_mode: found processor, but the tower's .*{message}") as caught:
        load_processor(spec)
    assert "\n" not in str(caught.value)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"size": 0}, "size of the preprocessor config's size is 0"),
    ({"size": {"height": -28, "width": 28}}, "height of the preprocessor config's size is -28"),
    ({"size": {"shortest_edge": 10**9}, "crop_size": SQUARE}, "shortest_edge of the .* size is 1000000000"),
    ({"size": {"height": "x", "width": 28}}, "image size of .* a number or height and width is needed"),
    ({"size": [28]}, r"image size of .* is \[28\]"),
    ({"size": True}, "size is True"),
    ({"image_mean": 5}, "image_mean is 5, needs three numbers"),
    ({"image_mean": ["a", "b", "c"]}, "image_mean is .*, needs three numbers"),
    ({"image_std": [1, 0, 1]}, r"image_std is \[1, 0, 1\], needs three numbers above 0"),
    ({"image_std": [1, float("nan"), 1]}, "image_std is nan, needs a finite number"),
]


@pytest.mark.parametrize(("settings", "message"), BROKEN)
def test_settings_that_give_no_pixels_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.vision: .*{message}") as caught:
        spec_at(tower_with(tmp_path, {"size": SQUARE, **settings}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"size": NaN}'])
def test_a_damaged_preprocessor_config_is_not_passed_over(tmp_path: Path, content: str) -> None:
    """The usual one would be another."""
    tower_with(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^model.vision: .*preprocessor_config\.json"):
        spec_at(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text('{"image_processor": 5}')
    with pytest.raises(ConfigError, match=r"image_processor in .*processor_config\.json' is 5, needs an object"):
        spec_at(tmp_path)


def test_a_whole_processor_s_config_counts_before_the_images_own(tmp_path: Path) -> None:
    tower_with(tmp_path, {"size": SQUARE, "image_mean": [0, 0, 0]})
    whole = {"image_processor": {"size": SQUARE, "image_mean": [1, 1, 1]}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert spec_at(tmp_path).mean == (0, 0, 0)
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    assert spec_at(tmp_path).mean == (1, 1, 1)


@pytest.mark.parametrize("name", ["os", "../x", "", 5, ["a"]])
def test_a_processor_of_no_class_is_told(tmp_path: Path, name: Any) -> None:
    spec = spec_at(tower_with(tmp_path, {"size": SQUARE, "image_processor_type": name}))
    with pytest.raises(ConfigError, match="has no form for Pillow"):
        load_processor(spec)
