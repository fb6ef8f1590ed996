"""`runtime`: where and how the ranks run."""

from typing import Literal

from pydantic import Field

from megatron_vlm.config.schema.base import NonNegativeInt, PositiveInt, Section


class RuntimeConfig(Section):
    """Device, seed and timeout of the ranks."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What the ranks compute on. auto: GPUs where there are any, else the CPU."
    )
    seed: NonNegativeInt = Field(default=42, description="Seed of random weights and of the order of samples.")
    timeout_seconds: PositiveInt = Field(
        default=600, description="Seconds that a rank waits for the others in a collective before the run fails."
    )
