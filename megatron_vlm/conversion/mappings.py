"""The names of Hugging Face tensors in the one spelling that is used here, and the table of a model they make up.

Which parameter of ours is made of which of them, and how it is cut, is said in `models.parameters`.
"""

import re
from typing import TYPE_CHECKING

from megatron_vlm.models.architectures import parameter_table
from megatron_vlm.models.cuts import Mapping

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # one where they are tied
TOWER_PREFIX = "vision_tower."
COMPUTED_BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|embeddings\.position_ids)$")  # old versions stored them

# On-disk and in-memory prefixes of LLaVA checkpoints, old and new, and what they are here; the first that fits counts.
_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
)


def canonical_name(name: str) -> str:
    """A Hugging Face tensor's name in the one spelling the table uses.

    LlamaForCausalLM's for the language model, `vision_tower.` and `multi_modal_projector.` for the rest. Accepts names
    of LlamaForCausalLM and of LlavaForConditionalGeneration, before and since transformers 4.52.
    """
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def tower_name(name: str) -> str:
    """The canonical name of a tower's tensor, whether or not the class in memory has an inner `vision_model`."""
    return TOWER_PREFIX + name.removeprefix("vision_model.")


def projector_name(name: str) -> str:
    """The canonical name of a projector's tensor: `2.bias` -> `multi_modal_projector.linear_2.bias`."""
    index, _, rest = name.partition(".")
    if index.isdecimal():
        name = f"linear_{int(index) // 2 + 1}.{rest}"  # linear layers and activations alternate
    return f"multi_modal_projector.{name}"


def language_mappings(hf_config: "PretrainedConfig") -> list[Mapping]:
    """The table of a language model."""
    table = parameter_table(hf_config)
    layers = (_layer_mappings(hf_config, layer) for layer in range(hf_config.num_hidden_layers))
    return [*table.before_layers(), *(entry for layer in layers for entry in layer), *table.after_layers()]


def _layer_mappings(hf_config: "PretrainedConfig", layer: int) -> list[Mapping]:
    return parameter_table(hf_config).layer(layer)
