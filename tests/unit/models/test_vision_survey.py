"""Facts of towers found on the meta device, and pixels from preprocessor configs."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPConfig, CLIPVisionConfig

from megatron_vlm.config.schema import VisionConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.survey import load_vision_config, survey_tower
from tests.unit.models.recipes import SMALL_TOWER, small_tower


def tower(model_type: str = "clip_vision_model", **keys: Any) -> VisionConfig:
    """`select_*` go to the recipe's section, the rest into the tower's config."""
    section = {key: keys.pop(key) for key in ("select_layer", "select_feature") if key in keys}
    return VisionConfig(config=small_tower(model_type, **keys), **section)


@pytest.mark.parametrize(
    ("model_type", "num_leading", "unreached"),
    [
        ("clip_vision_model", 1, "post_layernorm.weight"),
        ("siglip_vision_model", 0, "head.probe"),
        ("dinov2", 1, "embeddings.mask_token"),
        ("dinov2_with_registers", 5, "layernorm.weight"),
        ("vit", 1, "pooler.dense.weight"),
    ],
)
def test_tokens_and_unreached_parameters(model_type: str, num_leading: int, unreached: str) -> None:
    patch = survey_tower(tower(model_type), None)
    whole = survey_tower(tower(model_type, select_feature="cls_patch"), None)
    assert patch.media_spec.tokens_per_image == patch.media_spec.num_patches == 16
    assert whole.media_spec.tokens_per_image == 16 + num_leading
    assert (patch.num_dropped_tokens, whole.num_dropped_tokens) == (num_leading, 0)
    assert patch.selected == patch.num_kept_layers == 3
    assert unreached in patch.unreached
    last_layer = {name for name in patch.parameter_names if ".3." in f".{name}"}
    assert last_layer and last_layer <= patch.unreached
    assert not any(".2." in f".{name}" for name in patch.unreached)


def test_last_layer_is_reached_when_selected() -> None:
    survey = survey_tower(tower(select_layer=-1), None)
    assert survey.selected == 4
    assert survey.unreached == {"post_layernorm.weight", "post_layernorm.bias"}


def test_embeddings_alone_reach_no_layer() -> None:
    survey = survey_tower(tower(select_layer=0), None)
    assert (survey.selected, survey.num_kept_layers) == (0, 1)
    assert not any(name.startswith("encoder.layers") for name in set(survey.parameter_names) - survey.unreached)


@pytest.mark.parametrize("select_layer", [5, -6])
def test_layer_out_of_range(select_layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"select_layer is {select_layer}.*-5 to 4"):
        survey_tower(tower(select_layer=select_layer), None)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (VisionConfig(config={"model_type": "no_such_model"}), "no_such_model"),
        (VisionConfig(path="no/such/directory"), "no/such/directory"),
        (tower("siglip2_vision_model"), "image size of siglip2_vision_model is None"),
        (VisionConfig(config={"model_type": "resnet"}), "image size of resnet is None"),
        (tower("clip_vision_model", image_size=None), "image size of clip_vision_model is None"),
    ],
)
def test_models_that_are_no_towers(vision: VisionConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        survey_tower(vision, None)


def test_vision_part_of_a_whole_clip(tmp_path: Path) -> None:
    CLIPConfig(vision_config=CLIPVisionConfig(**SMALL_TOWER).to_dict()).save_pretrained(tmp_path)
    vision = VisionConfig(path=str(tmp_path))
    assert load_vision_config(vision).model_type == "clip_vision_model"
    assert survey_tower(vision, None).num_layers == 4


@pytest.mark.parametrize(
    ("settings", "size", "mean"),
    [
        ({"size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3]}, (28, 28), (0.1, 0.2, 0.3)),
        ({"size": {"shortest_edge": 99}, "do_center_crop": True, "crop_size": 28}, (28, 28), None),
        ({"size": {"shortest_edge": 28}, "do_center_crop": False, "crop_size": 99}, (28, 28), None),
        (None, (28, 28), None),
    ],
)
def test_pixels_come_from_the_preprocessor(
    tmp_path: Path, settings: dict[str, Any] | None, size: tuple[int, int], mean: tuple[float, ...] | None
) -> None:
    CLIPVisionConfig(**SMALL_TOWER).save_pretrained(tmp_path)
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    spec = survey_tower(VisionConfig(path=str(tmp_path)), None).media_spec
    assert (spec.height, spec.width) == size
    assert spec.mean == (mean or (0.48145466, 0.4578275, 0.40821073))


def test_siglip_defaults_to_half() -> None:
    spec = survey_tower(tower("siglip_vision_model"), None).media_spec
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)


def test_preprocessor_of_another_size_than_the_tower(tmp_path: Path) -> None:
    CLIPVisionConfig(**SMALL_TOWER).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 56}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\[1, 3, 56, 56\]"):
        survey_tower(VisionConfig(path=str(tmp_path)), None)
