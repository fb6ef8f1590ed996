"""A recipe's model, described once: what its configs say and what follows from them, without a weight.

`describe_model` reads the Hugging Face configs when the recipe is resolved. Validation, builder, plan of the data,
memory estimate, checkpoints and conversion are given the description, so that none of them reads a file or asks the hub
again, least of all while a checkpoint is saved (DESIGN D20).

Hazard: it is not the recipe's alone. A run that goes on keeps the pixels it began with (`training/pixels.py`), which
may be others than the tower's preprocessor config has by now: `with_pixels`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from megatron_vlm.config.schema import ModelConfig, VisionConfig
from megatron_vlm.errors import ConfigError, RecipeError, together
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.pixels import write_pixel_format
from megatron_vlm.models.vision.preprocessing import PixelFormat, TowerConfigs
from megatron_vlm.models.vision.survey import TowerSurvey, read_tower, survey_tower


@dataclass(frozen=True)
class ModelDescription:
    """A model before it is built: its configs, and the facts that follow from them.

    Args:
        language: Hugging Face config of the language model, of an architecture that is built here.
        tower: what the vision tower's directory says.
        survey: the tower's facts, the pixels it is given among them.
    """

    language: PretrainedConfig
    tower: TowerConfigs
    survey: TowerSurvey

    @property
    def media_spec(self) -> MediaSpec:
        """The pixels of an image, and the number of its tokens."""
        return self.survey.media_spec

    def with_pixels(self, pixels: PixelFormat) -> "ModelDescription":
        """The same model, given other pixels of the same size."""
        spec = replace(self.media_spec, **vars(pixels))
        return replace(self, survey=replace(self.survey, media_spec=spec))

    def as_saved(self) -> "ModelDescription":
        """The description with its configs as they come back from the files that `write` makes."""
        language, vision = (
            type(config).from_dict(json.loads(config.to_json_string()))
            for config in (self.language, self.survey.hf_config)
        )
        return replace(self, language=language, survey=replace(self.survey, hf_config=vision))

    def write(self, directory: Path, image_mode: str) -> None:
        """Writes the configs into a checkpoint: `language/` and `vision/`. Reads nothing. Raises OSError."""
        self.language.save_pretrained(directory / "language")
        self.survey.hf_config.save_pretrained(directory / "vision")
        write_pixel_format(directory / "vision", self.media_spec, image_mode)


def describe_model(
    model: ModelConfig,
    language: PretrainedConfig | None = None,
    tower: TowerConfigs | None = None,
    is_validated: bool = True,
) -> ModelDescription:
    """Reads what a recipe's model section names.

    Args:
        model: the section, which `names_its_model`.
        language, tower: configs that have been read, as those of a checkpoint or of another system's directory.
        is_validated: no rule will look at `select_layer`. Else one out of range is left to validation, which reports it
            with the recipe's other faults.

    Raises:
        ConfigError: for what is wrong with either, or both.
    """
    errors: list[ConfigError] = []
    try:
        language = language or load_language_config(model.language)
    except ConfigError as error:
        errors.append(error)
    try:
        tower = tower or read_tower(model.vision)
        vision = model.vision if is_validated else _with_layer_in_range(model.vision, tower)
        survey = survey_tower(vision, model.projector, tower)
    except ConfigError as error:
        errors.append(error)
    if errors:
        raise together(errors, RecipeError)
    assert language is not None and tower is not None
    return ModelDescription(language, tower, survey)


def _with_layer_in_range(vision: VisionConfig, tower: TowerConfigs) -> VisionConfig:
    num_layers = getattr(tower.hf_config, "num_hidden_layers", 0)
    in_range = min(max(vision.select_layer, -num_layers - 1), num_layers)
    return vision.model_copy(update={"select_layer": in_range})
