"""The table of families: each builds a VisionLanguageModel from a recipe and this rank's grid."""

from collections.abc import Callable

from megatron_vlm.config.schema import Config
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.registry import Registry

FamilyBuilder = Callable[[Config, Grid], VisionLanguageModel]
FAMILIES: Registry[FamilyBuilder] = Registry("model family")


def build_model(config: Config, grid: Grid) -> VisionLanguageModel:
    """The recipe's model with random weights, on the current device, frozen as configured.

    Raises ConfigError for an unknown family or a part that cannot be built.
    """
    return FAMILIES.get(config.model.family)(config, grid)
