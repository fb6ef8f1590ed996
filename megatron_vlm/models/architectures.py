"""The table of language models: by Hugging Face model type, where one departs from Llama.

All have Llama's wiring (norm, attention, norm, gated MLP, each added to its input) in megatron-core's parts. What a
model type may have of its own is listed in `LanguageArchitecture`; a new one is an entry here, or in a module of the
user's that the recipe names under `extensions:` (examples/extensions/own_language_model.py).

Hazard: a parameter that a layer has and its entry does not name is found when weights are loaded, not before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from megatron_vlm.registry import Registry

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class LayerParameter:
    """A parameter of every layer that Llama has not: 1-dimensional, and the same whole on every tensor-parallel rank.

    Args:
        source: the name Hugging Face gives it within a layer ("self_attn.q_norm.weight").
        size: its length.
    """

    source: str
    size: int


def _llama_layer(backend: str) -> "ModuleSpec":
    from megatron_vlm.models.specs import layer_spec  # with megatron-core, which reading a table does not need

    return layer_spec(backend)


def _nothing(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class LanguageArchitecture:
    """How a model type is built where it departs from Llama.

    Args:
        layer: attention backend -> one decoder layer.
        settings: fields of megatron-core's TransformerConfig that differ.
        parameters: what a layer has more: name within our layer ("self_attention.q_layernorm.weight") -> where it comes
            from. Which of them tensor or sequence parallelism must sum is megatron-core's to know.
    """

    layer: Callable[[str], "ModuleSpec"] = _llama_layer
    settings: Callable[[PretrainedConfig], Mapping[str, Any]] = _nothing
    parameters: Callable[[PretrainedConfig], Mapping[str, LayerParameter]] = _nothing


LANGUAGE_MODELS: Registry[LanguageArchitecture] = Registry("language model")
LANGUAGE_MODELS.register("llama")(LanguageArchitecture())
LANGUAGE_MODELS.register("qwen2")(LanguageArchitecture())
