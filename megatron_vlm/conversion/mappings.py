"""How Hugging Face tensors become a rank's shards: one declarative table, read in both directions.

Each entry names the global parameter, the Hugging Face tensors it is made of with their shapes, and by its class how
the whole is cut over the tensor-parallel ranks. `shard` goes one way, `unshard` the other; both are pure. The idea of a
bidirectional table is Megatron-Bridge's.

The hazards live in two classes. `QKV`: mcore keeps the heads interleaved by group (q q k v | q q k v | ...), Hugging
Face apart. `GatedMLP`: each rank holds its slice of gate above its slice of up, so cutting the concatenation is wrong.
Some models have either as one tensor: `Fused` takes it apart for these two, and nothing else knows of it.

torch is imported where tensors are cut, so that the table is at hand before (`transfer/head_start`).

Letters: h hidden, d head width, g kv heads (groups), f MLP width, V vocabulary.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_vlm.models.architectures import LANGUAGE_MODELS, head_width

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

Shape = tuple[int, ...]
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


@dataclass(frozen=True)
class Mapping(ABC):
    """One parameter and where it comes from.

    Args:
        name: global parameter name ("language.decoder.layers.3.mlp.linear_fc2.weight").
        sources: canonical Hugging Face names.
        shapes: of the sources, in their order.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @abstractmethod
    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        """The sources -> the shard of tensor-parallel rank `rank` of `size`."""

    @abstractmethod
    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        """All shards in rank order -> the sources. Inverse of `shard`."""

    def row_runs(self) -> list[tuple[int, int, int]]:
        """The whole parameter, as one rank has it, as runs of the sources' rows: (source, first row, row after)."""
        return [(source, 0, shape[0] if shape else 1) for source, shape in enumerate(self.shapes)]

    def apart(self) -> "Mapping":
        """The same parameter made of all its parts, though some may be one tensor on the disk."""
        return self


class Replicated(Mapping):
    """The same whole tensor on every rank."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return full[0]

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (shards[0],)


class Column(Mapping):
    """Cut over outputs, dimension 0: [out, ...] -> [out/tp, ...]."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return _slice(full[0], rank, size, dim=0)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(shards),)


class Row(Mapping):
    """Cut over inputs, dimension 1: [out, in] -> [out, in/tp]."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return _slice(full[0], rank, size, dim=1)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(shards, dim=1),)


class Vocab(Mapping):
    """Cut over the vocabulary, padded with zero rows to a multiple of the ranks: [V, h] -> [ceil(V/tp), h]."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        rows = -(-full[0].shape[0] // size)
        own = full[0][rank * rows : (rank + 1) * rows]
        return _joined([own, own.new_zeros(rows - own.shape[0], *own.shape[1:])]) if len(own) < rows else own

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(shards)[: self.shapes[0][0]],)


class GatedMLP(Mapping):
    """gate [f, h] and up [f, h] -> [2f/tp, h]: this rank's slice of gate above its slice of up."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return _joined([_slice(part, rank, size, dim=0) for part in full])

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return tuple(_joined([half[i] for half in halves]) for i in range(2))


@dataclass(frozen=True)
class QKV(Mapping):
    """q [g*n*d, ...], k and v [g*d, ...] (n queries per group) -> interleaved by group, [g*(n+2)*d/tp, ...]; or biases.

    The cut is plain and may run through a group where there are fewer groups than ranks: mcore gathers there.
    """

    num_groups: int

    def row_runs(self) -> list[tuple[int, int, int]]:
        widths = [shape[0] // self.num_groups for shape in self.shapes]
        return [
            (source, group * width, (group + 1) * width)
            for group in range(self.num_groups)
            for source, width in enumerate(widths)
        ]

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        groups = [part.unflatten(0, (self.num_groups, -1)) for part in full]  # [g*x, ...] -> [g, x, ...]
        return _slice(_joined(groups, dim=1).flatten(0, 1), rank, size, dim=0)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        groups = _joined(shards).unflatten(0, (self.num_groups, -1))  # -> [g, (n+2)*d, ...]
        widths = [shape[0] // self.num_groups for shape in self.shapes]
        return tuple(part.flatten(0, 1) for part in groups.split(widths, dim=1))


@dataclass(frozen=True)
class Fused(Mapping):
    """The sources of another mapping as one, in their order: [a, ...], [b, ...], ... <- [a + b + ..., ...]."""

    parts: Mapping

    @classmethod
    def of(cls, parts: Mapping, source: str) -> "Fused":
        """The mapping whose sources are rows of the tensor `source`."""
        whole = (sum(shape[0] for shape in parts.shapes), *parts.shapes[0][1:])
        return cls(parts.name, (source,), (whole,), parts)

    def row_runs(self) -> list[tuple[int, int, int]]:
        starts = list(accumulate((shape[0] for shape in self.parts.shapes), initial=0))
        return [(0, starts[part] + first, starts[part] + after) for part, first, after in self.parts.row_runs()]

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return self.parts.shard(full[0].split([shape[0] for shape in self.parts.shapes]), rank, size)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(self.parts.unshard(shards)),)

    def apart(self) -> Mapping:
        return self.parts


def language_mappings(hf_config: "PretrainedConfig") -> list[Mapping]:
    """The table of a Llama-architecture language model (Llama, Mistral; Qwen2 with its biases on q, k and v; Phi-3
    with q, k and v in one tensor, gate and up in another)."""
    vocabulary, hidden = hf_config.vocab_size, hf_config.hidden_size
    table: list[Mapping] = [
        Vocab("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((vocabulary, hidden),)),
        Replicated("language.decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),)),
    ]
    if not hf_config.tie_word_embeddings:
        table.append(Vocab("language.output_layer.weight", ("lm_head.weight",), ((vocabulary, hidden),)))
    for layer in range(hf_config.num_hidden_layers):
        table += _layer_mappings(hf_config, layer)
    return table


def _layer_mappings(hf_config: "PretrainedConfig", layer: int) -> list[Mapping]:
    ours, theirs = f"language.decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, width = hf_config.hidden_size, hf_config.intermediate_size
    head = head_width(hf_config)
    groups = hf_config.num_key_value_heads
    q_rows, kv_rows = hf_config.num_attention_heads * head, groups * head
    projections = tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv")
    rows = (q_rows, kv_rows, kv_rows)
    attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
    table: list[Mapping] = [
        Replicated(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), ((hidden,),)),
        QKV(
            f"{attention}.linear_qkv.weight",
            tuple(f"{projection}.weight" for projection in projections),
            tuple((n, hidden) for n in rows),
            groups,
        ),
        Row(f"{attention}.linear_proj.weight", (f"{theirs}.self_attn.o_proj.weight",), ((hidden, q_rows),)),
        Replicated(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), ((hidden,),)),
        GatedMLP(
            f"{mlp}.linear_fc1.weight",
            (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
            ((width, hidden), (width, hidden)),
        ),
        Row(f"{mlp}.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), ((hidden, width),)),
    ]
    if hf_config.model_type == "qwen2":
        biases = tuple(f"{projection}.bias" for projection in projections)
        table.append(QKV(f"{attention}.linear_qkv.bias", biases, tuple((n,) for n in rows), groups))
    architecture = LANGUAGE_MODELS.get(hf_config.model_type)
    for name, parameter in architecture.parameters(hf_config).items():
        table.append(Replicated(f"{ours}.{name}", (f"{theirs}.{parameter.source}",), ((parameter.size,),)))
    fused = {f"{ours}.{name}": f"{theirs}.{source}" for name, source in architecture.fused.items()}
    return [Fused.of(entry, fused[entry.name]) if entry.name in fused else entry for entry in table]


def _joined(parts: "Sequence[Tensor]", dim: int = 0) -> "Tensor":
    import torch

    return torch.cat(tuple(parts), dim=dim)


def _slice(tensor: "Tensor", rank: int, size: int, dim: int) -> "Tensor":
    assert tensor.shape[dim] % size == 0, f"{tensor.shape[dim]} does not divide into {size}"
    return tensor.chunk(size, dim=dim)[rank]
