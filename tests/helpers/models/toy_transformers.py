"""A language model that transformers has and this package has not: Qwen2 with two norms more in each layer."""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm


class ToyConfig(Qwen2Config):
    model_type = "toy"


class ToyLayer(Qwen2DecoderLayer):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_out_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_out_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keywords)
        hidden_states = hidden_states + self.attention_out_norm(attended)
        return hidden_states + self.mlp_out_norm(self.mlp(self.post_attention_layernorm(hidden_states)))


class ToyModel(Qwen2Model):
    config_class = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        for number in range(config.num_hidden_layers):
            self.layers[number] = ToyLayer(config, number)
        self.post_init()


class ToyForCausalLM(Qwen2ForCausalLM):
    config_class = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)
        self.post_init()


AutoConfig.register("toy", ToyConfig)
AutoModel.register(ToyConfig, ToyModel)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
