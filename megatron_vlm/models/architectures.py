"""The table of language models: by Hugging Face model type, where one departs from Llama.

All have Llama's wiring (norm, attention, norm, gated MLP, each added to its input) in megatron-core's parts. What a
model type may have of its own is listed in `LanguageArchitecture`; a new one is an entry here, or in a module of the
user's that the recipe names under `extensions:` (examples/extensions/own_language_model.py).

Hazard: a parameter that a layer has and its entry does not name is found when weights are loaded, not before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import Registry

if TYPE_CHECKING:  # reading the table needs none of them, and transformers takes seconds to be imported
    from megatron.core.transformer.spec_utils import ModuleSpec
    from transformers import PretrainedConfig

    from megatron_vlm.config.schema import LanguageConfig, OpsConfig


@dataclass(frozen=True)
class LayerParameter:
    """A parameter of every layer that Llama has not: 1-dimensional, and the same whole on every tensor-parallel rank.

    Args:
        source: the name Hugging Face gives it within a layer ("self_attn.q_norm.weight").
        size: its length.
    """

    source: str
    size: int


def _llama_layer(ops: "OpsConfig") -> "ModuleSpec":
    from megatron_vlm.models.specs import layer_spec  # with megatron-core, which reading a table does not need

    return layer_spec(ops)


def _nothing(hf_config: "PretrainedConfig") -> dict[str, Any]:
    return {}


def _no_softcap(hf_config: "PretrainedConfig") -> None:
    return None


@dataclass(frozen=True)
class LanguageArchitecture:
    """How a model type is built where it departs from Llama.

    Args:
        layer: the recipe's backends -> one decoder layer.
        settings: fields of megatron-core's TransformerConfig that differ.
        parameters: what a layer has more: name within our layer ("self_attention.q_layernorm.weight") -> where it comes
            from. Which of them tensor or sequence parallelism must sum is megatron-core's to know.
        logit_softcap: the final logits become this much * tanh(logits / this much); None: they stay.
    """

    layer: Callable[["OpsConfig"], "ModuleSpec"] = _llama_layer
    settings: Callable[["PretrainedConfig"], Mapping[str, Any]] = _nothing
    parameters: Callable[["PretrainedConfig"], Mapping[str, LayerParameter]] = _nothing
    logit_softcap: Callable[["PretrainedConfig"], float | None] = _no_softcap


LANGUAGE_MODELS: Registry[LanguageArchitecture] = Registry("language model")
LANGUAGE_MODELS.register("llama")(LanguageArchitecture())
LANGUAGE_MODELS.register("qwen2")(LanguageArchitecture())

FULL_ATTENTION = "full_attention"  # as transformers names it
ATTENTION_SOFTCAP, LOGIT_SOFTCAP = "attn_logit_softcapping", "final_logit_softcapping"
ROPE_TYPES = ("default", "linear", "llama3")  # those whose frequencies do not depend on the sequence's length


def head_width(hf_config: "PretrainedConfig") -> int:
    """Width of one attention head; it need not be hidden / heads."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def load_language_config(language: "LanguageConfig") -> "PretrainedConfig":
    """The Hugging Face config of `model.language`, from its path or from the recipe.

    Raises:
        ConfigError: unreadable, an unknown model type or key values, or an architecture this package does not build.
    """
    from megatron_vlm.models.hf_config import config_from_dict, config_from_path

    if language.config is not None:
        hf_config = config_from_dict("model.language.config", language.config)
    else:
        assert language.path is not None, "validated with the recipe"
        hf_config = config_from_path("model.language.path", language.path)
    check_architecture(hf_config)
    return hf_config


def check_architecture(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError, naming key and value, for a model or position encoding that the layers here do not compute.

    Biases and activations are `config.megatron.transformer_config`'s to refuse.
    """
    if hf_config.model_type not in LANGUAGE_MODELS:
        allowed = ", ".join(LANGUAGE_MODELS.names())
        raise ConfigError(f"model.language: model_type is {hf_config.model_type!r}, allowed: {allowed}")
    _check_attention(hf_config)
    rope_type = hf_config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"model.language: rope_type is {rope_type!r}, allowed: {', '.join(ROPE_TYPES)}")


def _check_attention(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError where a query does not see every token before it, or scores or logits are capped.

    Asked of every model type, since an entry in the table would otherwise train without what its config says.
    """
    if getattr(hf_config, "use_sliding_window", False):
        raise ConfigError("model.language: use_sliding_window is true, allowed: false")
    others = sorted({kind for kind in getattr(hf_config, "layer_types", None) or () if kind != FULL_ATTENTION})
    if others:
        raise ConfigError(f"model.language: layer_types has {', '.join(map(repr, others))}, allowed: {FULL_ATTENTION}")
    window = getattr(hf_config, "sliding_window", None)
    if window is not None and getattr(hf_config, "use_sliding_window", True):
        raise ConfigError(
            f"model.language: sliding_window is {window}, allowed: null (set it where no row is longer than the window)"
        )
    computed = {
        ATTENTION_SOFTCAP: None,
        LOGIT_SOFTCAP: LANGUAGE_MODELS.get(hf_config.model_type).logit_softcap(hf_config),
    }
    for key, allowed in computed.items():
        found = getattr(hf_config, key, None)
        if found != allowed:
            raise ConfigError(f"model.language: {key} is {found}, allowed: {'null' if allowed is None else allowed}")
