"""The recipe: its typed tree, how it is read, and what makes it valid.

`config.megatron`, which turns it into megatron-core's own objects, is imported by its full name: it needs torch, and
the names below do not.
"""

from megatron_vlm.config.loading import config_from_tree, config_hash, load_config, to_yaml
from megatron_vlm.config.rules import ModelFacts, names_its_model, trains, validate
from megatron_vlm.config.schema import Config

__all__ = [
    "Config",
    "ModelFacts",
    "config_from_tree",
    "config_hash",
    "load_config",
    "names_its_model",
    "to_yaml",
    "trains",
    "validate",
]
