"""The table of families: each builds a VisionLanguageModel from a recipe, its model's description and a grid."""

from collections.abc import Callable

from megatron_vlm.config.schema import Config
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.registry import Registry

FamilyBuilder = Callable[[Config, ModelDescription, Grid], VisionLanguageModel]
FAMILIES: Registry[FamilyBuilder] = Registry("model family")


def build_model(config: Config, model: ModelDescription, grid: Grid) -> VisionLanguageModel:
    """The recipe's model, as it is described, with random weights, on the current device, frozen as configured.

    Raises ConfigError for an unknown family or a part that cannot be built.
    """
    return FAMILIES.get(config.model.family)(config, model, grid)
