"""A transformers model config, from a directory or hub id, or from the dictionary of a recipe, strict about its keys.

transformers takes any key and keeps it; a misspelt one would train another model than was meant. So a key must be one
the model type's own config has, another name of one, or of the few that transformers reads although not every config
class lists them.

Hazards: left alone, transformers asks on the terminal whether to run code that lies beside a config, and takes any text
for a hub id, so that a mistyped path costs a riddle. Code is never run, and what has the form of a path must be one.
"""

import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean

# read, though not every class lists them
OTHER_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "head_dim")


def refuse_missing_directory(key: str, path: str) -> None:
    """Raises ConfigError naming `key` where `path` has a form that no hub id has, and is no directory."""
    is_path = os.path.isabs(path) or path.count("/") > 1 or path.startswith((".", "~")) or os.path.isfile(path)
    if is_path and not os.path.isdir(path):
        what = "a file" if os.path.isfile(path) else "not there"
        raise ConfigError(f"{key}: found {path!r}, which is {what}, needs a directory or a hub id")


def config_from_path(key: str, path: str) -> PretrainedConfig:
    """The config of a directory or hub id.

    Raises:
        ConfigError: naming `key`, where there is none, one that cannot be read, or one that wants code of its own run.
    """
    refuse_missing_directory(key, path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{key}: no usable config in {path!r}: {_reason(error)}") from error


def config_from_dict(key: str, settings: dict[str, Any]) -> PretrainedConfig:
    """The config of `settings["model_type"]` with the other settings in it.

    Args:
        key: of the recipe, for errors ("model.language.config").
        settings: the dictionary found there.

    Raises:
        ConfigError: no or an unknown model type, an unknown key, or a value the model type refuses.
    """
    values = dict(settings)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING, "needs a model type that transformers knows")
        raise ConfigError(f"{key}.model_type: found {model_type!r}, {hint}")
    known = known_keys(model_type)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{key}.{name}: unknown key, {did_you_mean(name, known, f'{model_type} has no such key')}"
            )
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"{key}: {model_type} refuses it: {_reason(error)}") from error


def known_keys(model_type: str) -> set[str]:
    """The keys of a model type: its class' own, other names of them, and those that transformers reads all the same."""
    defaults = AutoConfig.for_model(model_type)
    return {*vars(defaults), *defaults.attribute_map, *OTHER_KEYS}


def _reason(error: Exception) -> str:
    """The lines of a refusal as one; of transformers' essays on other errors, the first."""
    lines = str(error).split("\n") if isinstance(error, StrictDataclassError) else str(error).strip().split("\n")[:1]
    return " ".join(" ".join(lines).split()) or repr(error)
