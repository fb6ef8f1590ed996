"""`training`: the step, its batch and its length, and how many there are."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_vlm.config.schema.base import Number, PositiveInt, Section

RowLength = Annotated[int, Field(ge=2), Number]  # a token, and one that it predicts


class RecomputeConfig(Section):
    """Activations that are computed again in the backward pass instead of kept, by component."""

    language: Literal["none", "selective", "full"] = Field(
        default="none", description="Of the language model. selective: attention alone; full: whole layers."
    )
    vision: Literal["none", "full", "encoder"] = Field(
        default="none",
        description="Of tower and projector. full: each layer of the tower; encoder: all of both that trains.",
    )


class TrainingConfig(Section):
    """The step: its batch, its length, and how many there are."""

    mode: Literal["train", "eval", "train_and_eval"] = Field(
        default="train", description="Train, evaluate what is there, or evaluate while training."
    )
    sequence_length: RowLength = Field(
        default=2048,
        description="Longest row in tokens, those of images included; rounded up to what the ranks can cut.",
    )
    global_batch_size: PositiveInt = Field(default=128, description="Rows of a step, over all ranks.")
    micro_batch_size: PositiveInt = Field(
        default=1, description="Rows that a replica sends through the model at one time."
    )
    steps: PositiveInt = Field(description="Number of updates.")
    media_window: PositiveInt | None = Field(
        default=None,
        description="Micro-batches whose images and frames are encoded together, for one run of the pipeline. null: "
        "all of a step.",
    )
    media_batch: PositiveInt | None = Field(
        default=None, description="Images and frames that a rank encodes at one time. null: all of its window."
    )
    recompute: RecomputeConfig = RecomputeConfig()
    max_nonfinite_steps: PositiveInt = Field(
        default=10,
        description="Updates in a row that may be left out, for gradients that are not finite, before the run stops.",
    )
