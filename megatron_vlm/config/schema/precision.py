"""`precision`: the number formats of parameters, gradients and matrix products."""

from typing import Literal

from pydantic import Field

from megatron_vlm.config.schema.base import NonNegativeInt, Section


class Fp8ExcludeConfig(Section):
    """Layers of the language model that are not in FP8."""

    first: NonNegativeInt = Field(default=0, description="Number of first layers that stay out of FP8.")
    last: NonNegativeInt = Field(default=0, description="Number of last layers that stay out of FP8.")


class PrecisionConfig(Section):
    """Number formats of the parameters, of the gradient reduction, and of the language model's linear layers."""

    params: Literal["fp32", "bf16"] = Field(default="bf16", description="Format of parameters and activations.")
    grad_reduce: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Format in which gradients are kept and summed over ranks."
    )
    fp8: Literal["tensorwise", "delayed", "blockwise"] | None = Field(
        default=None,
        description="FP8 of the language model's linear layers in training, by its scales. tensorwise: one per tensor, "
        "from the tensor itself; delayed: one per tensor, from its history; blockwise: one per block. Head, projector "
        "and tower never use it.",
    )
    fp8_gradients: Literal["e4m3", "e5m2"] = Field(
        default="e4m3",
        description="FP8 format of the gradients of layers' outputs; e5m2 has more range and a bit less precision.",
    )
    fp8_exclude: Fp8ExcludeConfig = Fp8ExcludeConfig()
    fp8_backend: Literal["auto", "native", "transformer_engine"] = Field(
        default="auto",
        description="What multiplies in FP8. native: our own kernels, tensorwise only; auto: Transformer Engine where "
        "it is installed, else native.",
    )

    @property
    def needs_transformer_engine(self) -> bool:
        """Whether FP8 as asked for cannot do without it."""
        return self.fp8 is not None and (self.fp8 != "tensorwise" or self.fp8_backend == "transformer_engine")
