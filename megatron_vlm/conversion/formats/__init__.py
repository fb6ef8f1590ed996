"""Model directories of other systems, one module per format. Importing this registers all of them."""

from megatron_vlm.conversion.formats import llava as llava
from megatron_vlm.conversion.formats import llava_hf as llava_hf
from megatron_vlm.conversion.formats.base import FORMATS, ExternalParts, ForeignModel, ModelFolder, open_foreign
from megatron_vlm.conversion.formats.pair import open_pair
from megatron_vlm.conversion.formats.recipe import config_of, fill_model

__all__ = [
    "FORMATS",
    "ForeignModel",
    "ModelFolder",
    "ExternalParts",
    "config_of",
    "fill_model",
    "open_foreign",
    "open_pair",
]
