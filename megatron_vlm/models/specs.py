"""What a decoder layer is made of: mcore's linear layers and residual wiring, our norm and our core attention.

mcore's own torch norm refuses sequence parallelism; ours marks its weight `sequence_parallel`, by which mcore's
finalize knows to sum that gradient over the tensor ranks. A norm without the mark trains on a slice of the sequence,
silently.
"""

from functools import partial

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

from megatron_vlm.models.transformer_engine import with_transformer_engine
from megatron_vlm.ops.norm import rms_norm
from megatron_vlm.parallel.context_attention import ContextAttention


class RMSNorm(torch.nn.Module):
    """ops.rms_norm over the hidden dimension, built as mcore builds norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s/tp, b, h] -> [s/tp, b, h]."""
        return rms_norm(x, self.weight, self.eps)


def layer_spec(attention_backend: str) -> ModuleSpec:
    """One Llama-style layer: norm, self-attention, norm, gated MLP. `attention_backend`: of `ops.attention`."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(ContextAttention, backend=attention_backend),
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: TransformerConfig, layer: ModuleSpec, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's chunk `vp_stage`, and the final norm of the last one."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    if config.fp8 is not None:  # by Transformer Engine: only it makes anything of this (models/fp8.py)
        layer = with_transformer_engine(layer)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
