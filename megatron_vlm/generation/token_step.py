"""One token of every row through a chunk's layers, written out: what decoding does again and again.

A step of one token is little arithmetic under much Python: megatron-core's modules, their autograd functions and checks
cost several times what the small products do. Here a layer is a dozen calls on the layer's own weights, norm, rotation,
attention and cache being the same operations as in the modules.

Hazard: this is a second description of a layer. It is used only where every module is exactly one that it describes
(an adapter's subclass, a mixture of experts, a hook: all decode through the modules), and a test holds both equal.

Letters: b rows, h hidden, g kv heads and r query heads of each on this tensor rank, d head width, f MLP width.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import functional

from megatron_vlm.models.language import LanguageModel, LanguageSpec
from megatron_vlm.models.specs import DecoderLayer, FusedGateMLP, RMSNorm
from megatron_vlm.ops.activation import gated
from megatron_vlm.ops.attention import attention
from megatron_vlm.ops.reference import Activation
from megatron_vlm.ops.rope import apply_rope, rope_tables
from megatron_vlm.parallel.context_attention import ContextAttention, KVCache


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer on this tensor rank."""

    number: int
    softmax_scale: float
    window: int | None
    backend: str
    rope_backend: str
    norm: RMSNorm
    qkv: Tensor  # [g * (r + 2) * d, h]
    qkv_bias: Tensor | None
    out: Tensor  # [h, g * r * d]
    mlp_norm: RMSNorm
    gate_up: Tensor  # [2 * f, h]
    down: Tensor  # [h, f]
    gate: Activation
    gate_backend: str


class TokenStep:
    """The step of one chunk, whose weights it refers to: valid as long as nobody replaces them.

    Args:
        chunk: that `describes` accepts.
        cache: of the batch that is decoded.
    """

    def __init__(self, chunk: LanguageModel, cache: KVCache) -> None:
        self.chunk, self.cache, self.config, self.softcap = chunk, cache, chunk.config, chunk.spec.softcap
        self.layers = [_read(layer, chunk.spec) for layer in chunk.decoder.layers]
        self.group = chunk.pg_collection.tp
        self.group_size = self.group.size()
        self.kv_heads = self.config.num_query_groups // self.group_size
        self.heads_per_group = self.config.num_attention_heads // self.config.num_query_groups

    @staticmethod
    def describes(chunk: LanguageModel) -> bool:
        """Whether the layers are exactly what is written out here."""
        config = chunk.config
        plain = not config.attention_output_gate and config.num_query_groups % chunk.pg_collection.tp.size() == 0
        return plain and all(_is_plain(layer) for layer in chunk.decoder.layers)

    def __call__(self, ids: Tensor, position_ids: Tensor, hidden: Tensor | None) -> Tensor:
        """Same as the chunk's own forward with its cache.

        Args:
            ids, position_ids: [b, 1].
            hidden: [1, b, h] of the chunk before; None where this one is first.

        Returns:
            Last chunk: logits [b, 1, V]. Others: hidden [1, b, h].
        """
        chunk = self.chunk
        hidden = chunk.embedding(input_ids=ids, position_ids=position_ids) if hidden is None else hidden
        hidden = self._run_layers(hidden[0], position_ids)[None]  # [1, b, h] -> [b, h] -> [1, b, h]
        if not chunk.post_process:
            return hidden
        weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
        return chunk.output_layer(hidden, None, weight)

    def _run_layers(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """[b, h] -> [b, h], normed where the chunk is the last."""
        chunk = self.chunk
        cos, sin = rope_tables(position_ids, chunk.inverse_frequencies, chunk.spec.rope_scaling)  # [b, 1, d/2]
        for layer in self.layers:
            attended = self._attend(layer, layer.norm(hidden), cos, sin)
            normed, hidden = layer.mlp_norm.of_sum(attended, hidden)
            product = gated(functional.linear(normed, layer.gate_up), layer.gate, backend=layer.gate_backend)
            hidden = hidden + self._summed(functional.linear(product, layer.down))
        norm = chunk.decoder.final_layernorm
        return hidden if norm is None else norm(hidden)

    def _attend(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, h] -> [b, h]."""
        heads = self.heads_per_group
        # [b, h] -> [b, g * (r + 2) * d] -> [b, g, r + 2, d]
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(len(x), self.kv_heads, heads + 2, -1)
        # queries and key of each group
        rotated = apply_rope(qkv[:, :, : heads + 1], cos, sin, backend=layer.rope_backend)
        keys, values = self.cache.extend(layer.number, rotated[:, None, :, heads], qkv[:, None, :, heads + 1])
        keys, values, key_valid = self.cache.within(layer.number, keys, values, 1, layer.window)
        # The query heads of a group read the same keys: they are r queries of one head, and all keys come before them.
        out, lse = attention(
            rotated[:, :, :heads].transpose(1, 2),  # [b, g, r, d] -> [b, r, g, d]
            keys,
            values,
            causal=False,
            softmax_scale=layer.softmax_scale,
            softcap=self.softcap,
            key_valid=key_valid,
            backend=layer.backend,
        )
        out = self.cache.over_all_keys(out, lse)
        return self._summed(functional.linear(out.transpose(1, 2).reshape(len(x), -1), layer.out))

    def _summed(self, x: Tensor) -> Tensor:
        """Sums over the tensor ranks."""
        if self.group_size > 1:
            dist.all_reduce(x, group=self.group)
        return x


def _read(layer: DecoderLayer, spec: LanguageSpec) -> _Layer:
    attention_module, mlp = layer.self_attention, layer.mlp
    core = attention_module.core_attention
    return _Layer(
        number=core.layer_number,
        softmax_scale=core.softmax_scale,
        window=spec.windows[core.layer_number - 1],
        backend=core.backend,
        rope_backend=core.rope_backend,
        norm=layer.input_layernorm,
        qkv=attention_module.linear_qkv.weight,
        qkv_bias=attention_module.linear_qkv.bias,
        out=attention_module.linear_proj.weight,
        mlp_norm=layer.pre_mlp_layernorm,
        gate_up=mlp.linear_fc1.weight,
        down=mlp.linear_fc2.weight,
        gate=mlp.gate,
        gate_backend=mlp.backend,
    )


def _is_plain(layer: Any) -> bool:
    """Whether a layer is made of the modules that models/specs.py names, and of nothing else."""
    if type(layer) is not DecoderLayer or type(layer.self_attention) is not SelfAttention:
        return False
    attention_module, mlp = layer.self_attention, layer.mlp
    kinds = (
        (layer.input_layernorm, RMSNorm),
        (layer.pre_mlp_layernorm, RMSNorm),
        (attention_module.core_attention, ContextAttention),
        (attention_module.linear_qkv, ColumnParallelLinear),
        (attention_module.linear_proj, RowParallelLinear),
        (mlp, FusedGateMLP),
    )
    if any(type(module) is not kind for module, kind in kinds):
        return False
    if type(mlp.linear_fc1) is not ColumnParallelLinear or type(mlp.linear_fc2) is not RowParallelLinear:
        return False
    if not layer.adds_and_norms or mlp.gate is None:
        return False
    unnormed = attention_module.q_layernorm is None and attention_module.k_layernorm is None
    return unnormed and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
