"""The parts of a decoder layer: mcore's linear layers and residual wiring, our norm and our core attention.

mcore's own torch norm refuses sequence parallelism; ours marks its weight `sequence_parallel`, by which mcore's
finalize knows to sum that gradient over the tensor ranks. A norm without the mark trains on a slice of the sequence,
silently.

Norms, the MLP's gate and RoPE are computed by the backends of `ops.norm`, `ops.activation` and `ops.rope` that the
recipe names; the addition of the attention's output to its input is one with the norm after it. Where an architecture's
settings ask for what these do not compute (biases, a residual of its own width, a clamped gate), megatron-core's own
code computes that part.

Letters: s sequence, b rows, h hidden, f MLP width, tp tensor ranks.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional

from megatron_vlm.config.schema import OpsConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.transformer_engine import with_transformer_engine
from megatron_vlm.ops.activation import gated
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.ops.norm import add_rms_norm, rms_norm
from megatron_vlm.ops.reference import Activation
from megatron_vlm.parallel.context_attention import ContextAttention

GATES: dict[Any, Activation] = {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu"}


class RMSNorm(torch.nn.Module):
    """ops.rms_norm over the hidden dimension, built as mcore builds norms. `backend`: of `ops.norm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, backend: str = AUTO) -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s/tp, b, h] -> [s/tp, b, h]."""
        return rms_norm(x, self.weight, self.eps, backend=self.backend)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), each [s/tp, b, h]."""
        return add_rms_norm(x, residual, self.weight, self.eps, backend=self.backend)


class DecoderLayer(TransformerLayer):
    """mcore's layer, with the residual addition after attention and the norm before the MLP computed as one.

    mcore adds in `self_attn_bda` and norms in `_forward_mlp`; here the former hands both terms over to the latter.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        as_written = not (config.add_bias_linear or config.hidden_dropout or config.fp32_residual_connection)
        recomputed = self.recompute_mlp or self.recompute_pre_mlp_layernorm
        self.adds_and_norms = as_written and not recomputed and type(self.pre_mlp_layernorm) is RMSNorm
        if self.adds_and_norms:
            self.self_attn_bda = _both_terms

    def _forward_mlp(
        self, hidden_states: Tensor | tuple[Tensor, Tensor], inference_context: Any = None, padding_mask: Any = None
    ) -> Tensor:
        """[s/tp, b, h], or the two terms of it -> [s/tp, b, h]."""
        if not self.adds_and_norms:
            return super()._forward_mlp(hidden_states, inference_context, padding_mask)
        normed, residual = self.pre_mlp_layernorm.of_sum(*hidden_states)
        return self._forward_post_mlp(self.mlp(normed, padding_mask=padding_mask), residual)


def _both_terms(training: bool, fused: bool) -> Any:
    """Takes the place of mcore's `get_bias_dropout_add`, where there is neither bias nor dropout: adds nothing yet."""
    return lambda output_with_bias, residual, dropout: (output_with_bias[0], residual)


class FusedGateMLP(MLP):
    """mcore's gated MLP with the gate by ops.gated, on the first projection's whole output.

    Args:
        backend: of `ops.activation`; the other arguments are mcore's.

    Raises:
        ConfigError: a backend asked for by name, and a gate that only megatron-core computes.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, backend: str = AUTO, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        plain = (
            config.gated_linear_unit
            and not config.add_bias_linear
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0.0
        )
        self.gate = GATES.get(config.activation_func) if plain else None
        self.backend = backend
        if self.gate is None and backend != AUTO:
            raise ConfigError(f"ops.activation: {backend!r} cannot run: this model's MLP has a gate of its own")

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any) -> Any:
        """[s, b, h] -> ([s, b, h], no bias)."""
        if self.gate is None or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **unused)
        gate_up, _ = self.linear_fc1(hidden_states)  # [s/tp, b, h] -> [s, b, 2f/tp]
        return self.linear_fc2(gated(gate_up, self.gate, backend=self.backend))


def norm_spec(ops: OpsConfig) -> ModuleSpec:
    """Our norm with the recipe's backend, for any place in a layer."""
    return ModuleSpec(module=RMSNorm, params={"backend": ops.norm})


def layer_spec(ops: OpsConfig) -> ModuleSpec:
    """One Llama-style layer: norm, self-attention, norm, gated MLP, by the recipe's backends."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(ContextAttention, backend=ops.attention, rope_backend=ops.rope),
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=FusedGateMLP,
        params={"backend": ops.activation},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_spec(ops),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm_spec(ops),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TransformerConfig, layer: ModuleSpec, ops: OpsConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's chunk `vp_stage`, and the final norm of the last one."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    if config.fp8 is not None:  # by Transformer Engine: only it makes anything of this (models/fp8.py)
        layer = with_transformer_engine(layer)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm_spec(ops))
