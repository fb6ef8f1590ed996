"""Model directories of other systems, one module per format. Importing this registers all of them.

Torch and transformers come in when a directory is opened (`open_foreign`), not when one is looked at.
"""

from megatron_vlm.conversion.formats import llava as llava
from megatron_vlm.conversion.formats import llava_hf as llava_hf
from megatron_vlm.conversion.formats.base import FORMATS, ExternalParts, ForeignModel, ModelFolder, open_foreign
from megatron_vlm.conversion.formats.pair import open_pair

__all__ = [
    "FORMATS",
    "ForeignModel",
    "ModelFolder",
    "ExternalParts",
    "open_foreign",
    "open_pair",
]
