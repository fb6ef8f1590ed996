"""An extension that adds a language family: Qwen2's layers with a norm of attention's and of the MLP's output.

This file is all that such a family needs. transformers knows the model already (`toy_transformers`).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from megatron_vlm.config.schema import OpsConfig
from megatron_vlm.models.architectures import LANGUAGE_MODELS, LanguageArchitecture
from megatron_vlm.models.cuts import Replicated
from megatron_vlm.models.parameters import ParameterRow
from megatron_vlm.models.specs import DecoderLayer, ModuleSpec, RMSNorm, layer_spec
from tests.helpers.models import toy_transformers  # noqa: F401 (registers the model type)


class ToyLayer(DecoderLayer):
    """Our layer; what attention and MLP give is normalised before it is added to their input."""

    def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        sizes = config, config.hidden_size, config.layernorm_epsilon
        self.attention_out_norm, self.mlp_out_norm = RMSNorm(*sizes), RMSNorm(*sizes)
        self.self_attn_bda = normed_first(self.attention_out_norm, self.self_attn_bda)
        self.mlp_bda = normed_first(self.mlp_out_norm, self.mlp_bda)


def normed_first(norm: nn.Module, add: Callable[..., Any]) -> Callable[..., Any]:
    """mcore's addition of an output to its residual, in two calls, with the output normalised."""
    return lambda training, fused: (
        lambda output_with_bias, residual, dropout: add(training, fused)(
            (norm(output_with_bias[0]), None), residual, dropout
        )
    )


def toy_layer(ops: OpsConfig) -> ModuleSpec:
    spec = layer_spec(ops)
    spec.module = ToyLayer
    return spec


TOY = (
    ParameterRow(
        "*.attention_out_norm.weight",
        "*.attention_out_norm.weight",
        "[h]",
        Replicated,
        after="*.self_attention.linear_proj.weight",
    ),
    ParameterRow("*.mlp_out_norm.weight", "*.mlp_out_norm.weight", "[h]", Replicated),
)
LANGUAGE_MODELS.register("toy")(
    LanguageArchitecture(layer=toy_layer, parameters=TOY, qkv_bias=True, llava_name="Toy"),
)
