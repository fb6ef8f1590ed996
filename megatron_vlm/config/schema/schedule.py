"""`schedule`: the learning rate over the steps."""

from typing import Literal

from pydantic import Field

from megatron_vlm.config.schema.base import Fraction, NonNegativeFloat, Section


class ScheduleConfig(Section):
    """The learning rate over the steps, after a linear warm-up."""

    name: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the rate falls after the warm-up, down to `schedule.min_lr`."
    )
    warmup_ratio: Fraction = Field(
        default=0.03, description="Share of all steps in which the rate rises from 0 to its peak, rounded up to a step."
    )
    min_lr: NonNegativeFloat = Field(default=0.0, description="Learning rate at the end.")
