"""LLaVA: one vision tower, one projector, one decoder-only language model; an image's rows replace its placeholders.

Source: Liu et al., Visual Instruction Tuning (2023); Improved Baselines with Visual Instruction Tuning (LLaVA-1.5).
"""

from megatron_vlm.config.schema import Config
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.families.base import FAMILIES
from megatron_vlm.models.freezing import apply_freezing
from megatron_vlm.models.language import build_language_chunks
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.runtime.device import current_device


@FAMILIES.register("llava")
def build_model(config: Config, model: ModelDescription, grid: Grid) -> VisionLanguageModel:
    """This rank's part of the model: the whole encoder and its chunks of the language model; weights are random.

    Raises ConfigError where a part cannot be built.
    """
    vision = VisionEncoder(model.survey, config, model.language.hidden_size, grid.rank)
    language = build_language_chunks(config, model.language, grid)
    device = current_device()
    built = VisionLanguageModel(vision.to(device), [chunk.to(device) for chunk in language], grid)
    apply_freezing(built, config.model)
    return built
