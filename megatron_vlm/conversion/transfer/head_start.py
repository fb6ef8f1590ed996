"""An import's head start: the language model's weights begin to move while torch and transformers are imported.

Their import takes as long as the disk takes for several gigabytes. What the weights of a model like Llama become
(Mistral's are the same, Phi-3's the same but fused) is told by their names and shapes but for one number, that of the
heads, which config.json has where it is not the default. So the plan is guessed from headers, and compared with the one
made from the model's own config when that is known (`importing`); where they differ, the import starts again.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_vlm.conversion.mappings import (
    COMPUTED_BUFFERS,
    EMBEDDING,
    HEAD,
    Mapping,
    canonical_name,
    language_mappings,
)
from megatron_vlm.conversion.native.plan import Parameter, lay_out
from megatron_vlm.conversion.weights.files import StoredTensor, WeightFolder
from megatron_vlm.runtime.files import read_json

LLAMA_HEADS = 32  # where a config does not say; Mistral's, Qwen2's and Phi-3's default, too
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def guess_plan(folder: Path) -> list[Parameter]:
    """What most likely becomes of a directory's language model; nothing where it is none like Llama, in safetensors.

    Whatever is wrong with the directory is left to those who open it.
    """
    if not any(folder.glob("*.safetensors")):
        return []
    try:
        settings = read_json(folder / "config.json")
        places = WeightFolder(folder).places
        stored = {canonical_name(name): file.stored(name) for name, file in places.items()}
        table = language_mappings(_sizes(settings.get("text_config") or settings, stored))
        return lay_out(table, stored.__getitem__) if _fits(table, stored) else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return []


def _fits(table: Sequence[Mapping], stored: dict[str, StoredTensor]) -> bool:
    """Whether it takes every tensor of a layer, in its shape, and has nothing to convert, which needs torch."""
    expected = {name: shape for entry in table for name, shape in zip(entry.sources, entry.shapes, strict=True)}
    given = {
        name: tensor.shape
        for name, tensor in stored.items()
        if name in expected or (_LAYER.match(name) and not COMPUTED_BUFFERS.search(name))
    }
    return given == expected and all(len({stored[name].dtype for name in entry.sources}) == 1 for entry in table)


def _sizes(settings: dict[str, Any], stored: dict[str, StoredTensor]) -> Any:
    """What `language_mappings` asks of a config."""
    layer = "model.layers.0"
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    hidden, queries = shapes[f"{layer}.self_attn.o_proj.weight"]
    if fused := shapes.get(f"{layer}.self_attn.qkv_proj.weight"):
        model_type, keys = "phi3", (fused[0] - queries) // 2
    else:
        model_type = "qwen2" if f"{layer}.self_attn.q_proj.bias" in shapes else "llama"
        keys = shapes[f"{layer}.self_attn.k_proj.weight"][0]
    heads = settings.get("num_attention_heads") or LLAMA_HEADS
    if not isinstance(heads, int):
        raise TypeError("heads that are no whole number")
    width = queries // heads
    num_layers = 1 + max(int(found[1]) for name in shapes if (found := _LAYER.match(name)))
    if num_layers > len(shapes):
        raise ValueError("fewer tensors than layers")
    return SimpleNamespace(
        model_type=model_type,
        vocab_size=shapes[EMBEDDING][0],
        hidden_size=hidden,
        intermediate_size=shapes[f"{layer}.mlp.down_proj.weight"][1],
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=keys // width,
        head_dim=width,
        tie_word_embeddings=HEAD not in shapes,
    )
