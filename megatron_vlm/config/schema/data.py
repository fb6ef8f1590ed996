"""`data`: what is trained on, and how it becomes tokens and pixels."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_vlm.config.schema.base import NonNegativeFloat, NonNegativeInt, Plain, PositiveInt, Section, Share

BOOLEAN_PACKING = {True: "rows", False: "off"}  # what was meant once; and `off` is false in YAML
Packing = Annotated[
    Literal["auto", "samples", "rows", "off"],
    BeforeValidator(lambda found: BOOLEAN_PACKING[found] if isinstance(found, bool) else found),
]


class VideoConfig(Section):
    """The frames of a video that are trained, each as an image is."""

    num_frames: PositiveInt = Field(
        default=8, description="Frames spread evenly over a video; fewer where it has fewer, or where `fps` says so."
    )
    fps: NonNegativeFloat = Field(
        default=0.0, description="Most frames a second; 0: no such limit. A folder of frames has no seconds."
    )


class SourceConfig(Section):
    """One source that a mixture may name, or a mixture of such; what it does not say, the section `data` says."""

    path: str | tuple[str, ...] | None = Field(default=None, description="Its samples, as `data.path`.")
    mixture: str | None = Field(default=None, description="Instead of samples: a mixture of other sources.")
    source: str | None = Field(default=None, description="Registered format of its samples.")
    source_options: dict[str, Plain] | None = Field(default=None, description="Options of that format.")
    media_root: str | None = Field(default=None, description="Folder of its images and videos, as `data.media_root`.")
    template: str | None = Field(default=None, description="Registered name of how its conversations become text.")
    template_arguments: dict[str, Plain] | None = Field(default=None, description="Variables of its chat template.")
    render_turns: Literal["whole", "apart"] | None = Field(default=None, description="As `data.render_turns`.")
    image_token: str | None = Field(default=None, description="Text that marks an image in its conversations.")
    cap: PositiveInt | None = Field(default=None, description="Most of its samples that are trained, as `data.cap`.")
    held_out: Share | None = Field(default=None, description="Share of it that is not trained, as `data.held_out`.")


class DataConfig(Section):
    """Training data, and its way to tokens and pixels."""

    path: str | tuple[str, ...] | None = Field(
        default=None,
        description="The training samples: a file, a folder of files, a pattern such as `shards/*.jsonl`, or a list of "
        "these. Either this or `data.mixture` is given.",
    )
    mixture: str | None = Field(
        default=None,
        validate_default=True,
        description="Sources that are trained together, as `a + b*3 + c*0.5`: in an epoch each sample of b comes three "
        "times, and half of those of c come. A weight may be a fraction, `1/3`; `a@clean` leaves out the records "
        "listed in `data.subsets`.",
    )
    registry: str | tuple[str, ...] = Field(
        default=(),
        description="A YAML file of sources by name, each as in `data.sources`, or a list of these; later files "
        "override earlier ones.",
    )
    sources: dict[str, SourceConfig] = Field(
        default={}, description="Sources by name, those of `data.registry` among them, which these override."
    )
    subsets: str | None = Field(
        default=None,
        description="Folder of `SUBSET/SOURCE.json`: numbers, from 0, of the records that `SOURCE@SUBSET` leaves out.",
    )
    cap: PositiveInt | None = Field(
        default=None, description="Most samples of each source that are trained, drawn at random by `runtime.seed`."
    )
    held_out: Share = Field(
        default=0.0,
        description="Share of each source's samples, by a hash of their ids, that is not trained and is what is "
        "evaluated where `evaluation.path` is null.",
    )
    source: str = Field(default="llava_json", description="Registered format of `data.path` and of `evaluation.path`.")
    source_options: dict[str, Plain] = Field(default={}, description="Options of that format.")
    media_root: str | None = Field(
        default=None,
        description="Folder that paths of images and videos in the data are relative to, and may not lead out of. "
        "null: that of `data.path`, which they may.",
    )
    template: str = Field(
        default="auto",
        description="Registered name of how a conversation becomes text. auto: the tokenizer's own chat template.",
    )
    template_arguments: dict[str, Plain] = Field(
        default={}, description="Variables of the tokenizer's chat template, and the date it sees."
    )
    render_turns: Literal["whole", "apart"] = Field(
        default="whole",
        description="whole: a conversation is one sample; apart: each answer is one, with all that comes before it.",
    )
    image_mode: Literal["pad", "resize", "processor"] = Field(
        default="pad",
        description="How an image becomes the tower's square. pad: with a border; resize: stretched; processor: as "
        "the tower's own preprocessor config says.",
    )
    image_token: str = Field(default="<image>", description="Text that marks an image in a conversation.")
    video: VideoConfig = VideoConfig()
    group_by_modality_length: bool = Field(
        default=False,
        description="Make batches of samples of similar length, all with images or all without, as LLaVA does.",
    )
    packing: Packing = Field(
        default="auto",
        description="Several samples in a row of up to `training.sequence_length` tokens, each attending to itself "
        "alone. samples: a step is `training.global_batch_size` samples, laid into as few rows as they need, with the "
        "loss of `off`; rows: a step is so many rows, filled with as many samples as there is room for; off: a row is "
        "a sample; auto: samples, or off where attention cannot keep samples apart. true and false mean rows and off.",
    )
    pad_to_multiple_of: PositiveInt | None = Field(
        default=None,
        description="Tokens to a multiple of which rows are padded, up to `training.sequence_length`. null: 64 on "
        "GPUs, 1 on the CPU.",
    )
    on_long_sample: Literal["error", "truncate"] = Field(
        default="error",
        description="What is done with a sample longer than `training.sequence_length`; images are never cut in two.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error", description="What is done with a sample that cannot be used; skip leaves it out and tells."
    )
    num_workers: NonNegativeInt = Field(
        default=2, description="Processes of each rank that prepare batches; 0: the rank does it itself."
    )
    shuffle: bool = Field(
        default=True, description="Order samples at random, anew in each epoch, or in each cycle of a mixture."
    )

    @field_validator("mixture")
    @classmethod
    def _says_what(cls, mixture: str | None, info: ValidationInfo) -> str | None:
        """Refuses neither `path` nor `mixture`, and both; silent where `path` itself is at fault."""
        if "path" not in info.data:
            return mixture
        path = info.data["path"]
        if path is None and mixture is None:
            raise PydanticCustomError("no_data", "found neither path nor mixture, needs exactly one of them")
        if path is not None and mixture is not None:
            message = "found both path {path} and mixture {mixture}, needs exactly one of them (the other: null)"
            raise PydanticCustomError("two_data", message, {"path": str(path), "mixture": mixture})
        return mixture
