"""`optimizer`: AdamW and its peak learning rates."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_vlm.config.schema.base import NonNegativeFloat, Number, PositiveFloat, Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0), Number]  # 1 would divide by zero in Adam's bias correction


class OptimizerConfig(Section):
    """AdamW, with a peak rate of its own for a component where one is given."""

    name: Literal["adamw"] = Field(default="adamw", description="The optimizer.")
    lr: NonNegativeFloat = Field(default=2.0e-5, description="Peak learning rate.")
    lr_projector: NonNegativeFloat | None = Field(
        default=None, description="Peak learning rate of the projector. null: `optimizer.lr`."
    )
    lr_vision: NonNegativeFloat | None = Field(
        default=None, description="Peak learning rate of the vision tower. null: `optimizer.lr`."
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="Decay per step of the running means of gradients and of their squares."
    )
    eps: PositiveFloat = Field(default=1.0e-8, description="What is added to the root of the mean square.")
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="Decay of matrices, times the learning rate; biases and norms are not decayed."
    )
    clip_norm: NonNegativeFloat = Field(
        default=1.0, description="Largest norm of the whole gradient; what is longer is scaled down. 0: no clipping."
    )
    distributed: bool = Field(
        default=True, description="Cut the optimizer's states over the data-parallel ranks instead of copying them."
    )
