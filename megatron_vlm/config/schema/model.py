"""`model`: the parts of a vision-language model, where their weights come from, and which of them train."""

from typing import Any, Literal

from pydantic import Field

from megatron_vlm.config.schema.base import Integer, NonNegativeFloat, PositiveFloat, Section


class LanguageConfig(Section):
    """The language model."""

    path: str | None = Field(
        default=None, description="Its trained weights: a directory, or a hub id such as `org/name@revision`."
    )
    config: dict[str, Any] | None = Field(
        default=None, description="Its Hugging Face config as keys with values; the model then has random weights."
    )
    tokenizer: str | None = Field(
        default=None, description="Its tokenizer: a directory or a hub id. null: that of `model.language.path`."
    )


class VisionCostConfig(Section):
    """The cost of encoding an image or frame, linear * patches + quadratic * patches^2, in any unit."""

    linear: PositiveFloat = Field(description="Cost of a patch by itself.")
    quadratic: NonNegativeFloat = Field(default=0.0, description="Cost of a pair of patches.")


class VisionConfig(Section):
    """The vision tower."""

    path: str | None = Field(
        default=None, description="Its trained weights: a directory, or a hub id such as `org/name@revision`."
    )
    config: dict[str, Any] | None = Field(
        default=None, description="Its Hugging Face config as keys with values; the tower then has random weights."
    )
    preprocessor: dict[str, Any] | None = Field(
        default=None, description="Keys that replace those of the tower's own preprocessor config."
    )
    select_layer: Integer = Field(
        default=-2,
        description="Hidden state that the projector reads: 0 is the embeddings, n the output of layer n, -1 that of "
        "the last layer, -2 that of the one before it.",
    )
    select_feature: Literal["patch", "cls_patch"] = Field(
        default="patch", description="Tokens of that hidden state: the patches alone, or the class token too."
    )
    sharding: Literal["replicate"] = Field(
        default="replicate", description="How the tower's weights lie on the ranks. replicate: whole on each."
    )
    cost: VisionCostConfig | None = Field(
        default=None,
        description="Costs by which images and frames are shared out over the ranks. null: measured at the start.",
    )


class ProjectorConfig(Section):
    """The projector from the tower's width to the language model's."""

    type: str = Field(
        default="mlp2x_gelu",
        description="Registered name of the projector: `identity`, `linear`, `mlpNx_gelu` (N layers), "
        "`mlp_downsample`, `mlp_downsample_2x2_fix`, `mlp_downsample_3x3_fix`, `cluster`, or one of an extension.",
    )


class TrainableConfig(Section):
    """The components that train."""

    language: bool = Field(default=True, description="Train the language model.")
    vision: bool = Field(default=False, description="Train the vision tower.")
    projector: bool = Field(default=True, description="Train the projector.")


class ModelConfig(Section):
    """A vision-language model: its family, its parts, and what of them trains."""

    family: str = Field(default="llava", description="Registered name of how the parts are put together.")
    language: LanguageConfig
    vision: VisionConfig
    projector: ProjectorConfig = ProjectorConfig()
    train: TrainableConfig = TrainableConfig()
    freeze: tuple[str, ...] = Field(
        default=(),
        description="Regular expressions; a parameter that one of them matches anywhere in its name does not train.",
    )
