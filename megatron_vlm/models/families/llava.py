"""LLaVA: one vision tower, one projector, one decoder-only language model; an image's rows replace its placeholders.

Source: Liu et al., Visual Instruction Tuning (2023); Improved Baselines with Visual Instruction Tuning (LLaVA-1.5).
"""

from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.families.base import FAMILIES
from megatron_vlm.models.freezing import apply_freezing
from megatron_vlm.models.language import build_language_chunks
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.runtime.device import current_device


@FAMILIES.register("llava")
def build_model(config: Config, grid: Grid) -> VisionLanguageModel:
    """This rank's part of the model: the whole encoder and its chunks of the language model; weights are random.

    Raises ConfigError where a part cannot be built.
    """
    language_config = load_language_config(config.model.language)
    vision = VisionEncoder(
        survey_tower(config.model.vision, config.model.projector), config, language_config.hidden_size, grid.rank
    )
    language = build_language_chunks(config, language_config, grid)
    device = current_device()
    model = VisionLanguageModel(vision.to(device), [chunk.to(device) for chunk in language], grid)
    apply_freezing(model, config.model)
    return model
