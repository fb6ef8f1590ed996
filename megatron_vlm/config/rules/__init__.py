"""The recipe's rules, a file per section: its checks, what has no effect when, and what may change on a resume."""

from megatron_vlm.config.rules.base import ModelFacts
from megatron_vlm.config.rules.gathered import unused_keys, validate, validate_layout
from megatron_vlm.config.rules.model import REGEX_SECONDS, frozen_at_random, matches, names_its_model, trains

__all__ = [
    "REGEX_SECONDS",
    "ModelFacts",
    "frozen_at_random",
    "matches",
    "names_its_model",
    "trains",
    "unused_keys",
    "validate",
    "validate_layout",
]
