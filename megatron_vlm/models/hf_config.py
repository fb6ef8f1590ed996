"""A transformers model config from the dictionary of a recipe, strict about its keys.

transformers takes any key and keeps it; a misspelt one would train another model than was meant. So a key must be one
the model type's own config has, another name of one, or of the few that transformers reads although not every config
class lists them.
"""

import difflib
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_vlm.errors import ConfigError

OTHER_KEYS = ("rope_theta", "rope_scaling", "torch_dtype", "head_dim")  # read, though not every class lists them


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
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "needs a model type that transformers knows"
        raise ConfigError(f"{key}.model_type: found {model_type!r}, {hint}")
    defaults = AutoConfig.for_model(model_type)
    known = {*vars(defaults), *defaults.attribute_map, *OTHER_KEYS}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"{model_type} has no such key"
            raise ConfigError(f"{key}.{name}: unknown key, {hint}")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ConfigError(f"{key}: {model_type} refuses it: {reason}") from error
