"""`ops`: which backend computes each hot operation."""

from typing import Literal

from pydantic import Field

from megatron_vlm.config.schema.base import PositiveInt, Section

LayerBackend = Literal["auto", "reference", "torch", "triton"]


class OpsConfig(Section):
    """Backend of each hot operation; `auto` takes the fastest that can run and says so once."""

    attention: Literal["auto", "reference", "cpu", "triton", "cudnn", "flash_attn"] = Field(
        default="auto", description="Backend of the language model's attention."
    )
    norm: LayerBackend = Field(
        default="auto",
        description="Backend of RMSNorm, and of the residual addition before the one between attention and MLP.",
    )
    activation: LayerBackend = Field(default="auto", description="Backend of the MLP's gate.")
    rope: LayerBackend = Field(default="auto", description="Backend of the rotary position embedding.")
    projector: LayerBackend = Field(
        default="auto", description="Backend of the projectors that are made of several operations."
    )
    fp8_quantise: Literal["auto", "triton", "reference"] = Field(
        default="auto", description="Backend of quantisation where `precision.fp8_backend` is native."
    )
    loss_chunk_tokens: PositiveInt = Field(default=1024, description="Most tokens whose logits exist at one time.")

    def anywhere(self) -> "OpsConfig":
        """The same with every backend left to the machine: weights may be used on another one than trained them."""
        return self.model_copy(update={name: "auto" for name, value in self if isinstance(value, str)})
