"""A foreign model as a recipe and as the weights of a built model."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from megatron_vlm.config.loading import config_from_tree
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.formats.base import ForeignModel
from megatron_vlm.conversion.mappings import COMPUTED_BUFFERS
from megatron_vlm.conversion.weights.loading import VISION_PARTS, fill_language, fill_vision
from megatron_vlm.conversion.weights.sources import PartSource
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.architectures import check_architecture
from megatron_vlm.models.hf_config import known_keys
from megatron_vlm.models.vision.survey import TowerSurvey

if TYPE_CHECKING:  # they bring megatron-core in, which takes seconds and which a converter does not need
    from megatron_vlm.models.vlm import VisionLanguageModel
    from megatron_vlm.parallel.groups import Grid


def config_of(foreign: ForeignModel, **sections: Any) -> Config:
    """A recipe whose model and data sections fit the model; nothing trains.

    Args:
        sections: what differs, by section, key by key: `parallel={"tensor": 2}`.

    Raises:
        ConfigError: a section that is not valid, or an architecture this package does not build.
    """
    check_architecture(foreign.language)
    at_path = foreign.vision_path is not None
    model = {
        "language": {"config": _known_settings(foreign.language), "tokenizer": str(foreign.tokenizer)},
        "vision": {
            "path": str(foreign.vision_path) if at_path else None,
            "config": None if at_path else settings_of(foreign.vision),
            "select_layer": foreign.select_layer,
            "select_feature": foreign.select_feature,
        },
        "projector": {"type": foreign.projector},
        "train": {"language": False, "vision": False, "projector": False},
    }
    tree: dict[str, dict[str, Any]] = {
        "model": model,
        "data": {
            "path": "none.json",
            "template": foreign.template,
            "template_arguments": dict(foreign.template_arguments),
            "image_mode": foreign.image_mode,
            "video": foreign.video.model_dump(),
            "image_token": foreign.image_token,
        },
        "training": {"steps": 1},
        "checkpoint": {"directory": "none"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return config_from_tree(tree, f"{foreign.folder} as a recipe")


def parameter_format(foreign: ForeignModel) -> str:
    """`precision.params` that loses nothing: bf16 where all weights are; else fp32, which holds fp16's values too."""
    return "bf16" if stored_dtypes(foreign) == {torch.bfloat16} else "fp32"


def stored_dtypes(foreign: ForeignModel) -> set[torch.dtype]:
    """Dtypes of a checkpoint's weights, buffers that are computed left out."""
    names = (name for name in foreign.source.names() if not COMPUTED_BUFFERS.search(name))
    return {foreign.source.read(name).dtype for name in names}


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """The config as the dictionary that `model.*.config` takes."""
    settings = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    settings.pop("transformers_version", None)
    return {**settings, "model_type": config.model_type}


def _known_settings(config: PretrainedConfig) -> dict[str, Any]:
    """`settings_of` without the keys that transformers passes over, as those for code beside the weights (Phi-3's
    `auto_map`). Those of them that tell of another attention `check_architecture` has refused."""
    known = {*known_keys(config.model_type), "model_type"}
    return {key: value for key, value in settings_of(config).items() if key in known}


def fill_model(model: "VisionLanguageModel", foreign: ForeignModel, grid: "Grid") -> None:
    """Fills a built model, this rank's shards only.

    Raises:
        ConversionError: tensors missing, left over or of another shape, by name; as `check_selection`.
    """
    check_selection(foreign, model.vision.tower.survey)
    fill_language(model.language, PartSource(foreign.source, lambda name: not name.startswith(VISION_PARTS)), grid)
    fill_vision(model.vision, PartSource(foreign.source, lambda name: name.startswith(VISION_PARTS)))


def check_selection(foreign: ForeignModel, tower: TowerSurvey) -> None:
    """Raises ConversionError where a model that drops the first token of its tower drops no leading one with it."""
    if foreign.drops_first_token and tower.num_dropped_tokens != 1:
        raise ConversionError(
            f"{foreign.folder}/config.json: vision_feature_select_strategy is 'default', which drops the first token; "
            f"this {foreign.vision.model_type} has {tower.num_dropped_tokens} before its patches, needs 'full'"
        )
