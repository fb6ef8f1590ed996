"""An own language model: Qwen3, which is Llama with every query and key normalised before attention.

An entry says where a Hugging Face model type departs from Llama: its layer in megatron-core's parts, fields of
megatron-core's TransformerConfig, and rows of the parameters a layer has more, with the names they have on disk. Then
it trains in every layout, is planned and counted, and its weights are read and converted, as any other's. From nothing:

    extensions: [examples.extensions.own_language_model]
    model:
      language:
        config: {model_type: qwen3, vocab_size: 331, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4,
                 num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: false}
"""

from megatron_vlm.config.schema import OpsConfig
from megatron_vlm.models.architectures import LANGUAGE_MODELS, LanguageArchitecture
from megatron_vlm.models.cuts import Replicated
from megatron_vlm.models.parameters import ParameterRow
from megatron_vlm.models.specs import ModuleSpec, layer_spec, norm_spec


def qwen3_layer(ops: OpsConfig) -> ModuleSpec:
    """Llama's layer, and a norm over each head's queries and keys."""
    spec = layer_spec(ops)
    attention = spec.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = norm_spec(ops)
    return spec


QKV = "*.self_attention.linear_qkv.weight"  # which both follow in the forward pass
QWEN3 = (  # ours, theirs, shape: one weight per channel of a head
    ParameterRow("*.self_attention.q_layernorm.weight", "*.self_attn.q_norm.weight", "[d]", Replicated, after=QKV),
    ParameterRow("*.self_attention.k_layernorm.weight", "*.self_attn.k_norm.weight", "[d]", Replicated, after=QKV),
)

LANGUAGE_MODELS.register("qwen3")(
    LanguageArchitecture(
        layer=qwen3_layer,
        settings=lambda config: {"qk_layernorm": True},  # megatron-core then sums these gradients over tensor ranks
        parameters=QWEN3,
    )
)
