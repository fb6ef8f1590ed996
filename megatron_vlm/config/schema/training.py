"""`training`: the step, its batch and its length, and how many there are."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_vlm.config.schema.base import Number, PositiveFloat, PositiveInt, Section

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
    global_batch_size: PositiveInt = Field(
        default=128, description="Samples of a step, over all ranks; rows of several samples with `data.packing: rows`."
    )
    micro_batch_size: PositiveInt = Field(
        default=1,
        description="Rows that a replica sends through the model at one time; with `data.packing: samples` at most.",
    )
    steps: PositiveInt | None = Field(
        default=None, description="Number of updates. Either this or `training.epochs` is given."
    )
    epochs: PositiveFloat | None = Field(
        default=None,
        validate_default=True,
        description="Passes over the training data, in the place of `training.steps`: as many steps as there are whole "
        "global batches in so many passes. The data is counted when the run starts; on resume the steps are compared.",
    )
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

    @field_validator("epochs")
    @classmethod
    def _says_how_long(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        """Refuses neither `steps` nor `epochs`, and both; silent where `steps` itself is at fault."""
        if "steps" not in info.data:
            return epochs
        steps = info.data["steps"]
        if steps is None and epochs is None:
            raise PydanticCustomError("no_length", "found neither steps nor epochs, needs exactly one of them")
        if steps is not None and epochs is not None:
            message = "found both steps {steps} and epochs {epochs}, needs exactly one of them (the other: null)"
            raise PydanticCustomError("two_lengths", message, {"steps": steps, "epochs": epochs})
        return epochs

    @property
    def num_steps(self) -> int:
        """`steps`, which a recipe that gives `epochs` has once its data is counted (`training/epochs.py`)."""
        assert self.steps is not None, "training.epochs is resolved to steps before anything is trained"
        return self.steps
