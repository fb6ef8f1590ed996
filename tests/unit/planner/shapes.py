"""Models of a recipe, whose shapes and operations are counted."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vlm.config.schema import Config
from megatron_vlm.models.freezing import trainable_names
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.planner.flops import ModelShape, model_shape
from megatron_vlm.runtime.device import prepare

ALL = {"language": True, "vision": True, "projector": True}


def build(recipe: Config) -> tuple[VisionEncoder, torch.nn.Module, ModelShape]:
    """Tower and projector, a transformers language model, frozen as the recipe says, and their shape."""
    prepare("cpu")
    survey = survey_tower(recipe.model.vision, None)
    survey.hf_config._attn_implementation = "eager"  # torch's counter does not know the CPU's fused attention
    hf = AutoConfig.for_model(**recipe.model.language.config)
    vision = VisionEncoder(survey, recipe, hf.hidden_size, rank=0)
    language = AutoModelForCausalLM.from_config(hf, attn_implementation="eager", dtype=torch.float32)
    names = vision.global_names()
    trained = trainable_names(names.values(), recipe.model, {f"vision.{name}" for name in survey.unreached})
    for name, parameter in vision.named_parameters():
        parameter.requires_grad_(names[name] in trained)
    for parameter in language.parameters():
        parameter.requires_grad_(recipe.model.train.language)
    return vision, language, model_shape(vision, LanguageSpec.from_config(hf), recipe.model)
