"""Model families: how a recipe becomes a model. Importing this registers all of them."""

from megatron_vlm.models.families import llava as llava
from megatron_vlm.models.families.base import FAMILIES, build_model

__all__ = ["FAMILIES", "build_model"]
