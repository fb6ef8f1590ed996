"""The recipe as one typed, frozen tree (DESIGN D12): every key, its type, its default and its single-field limits.

Pydantic holds the shape and refuses unknown keys; what depends on several fields, on the world size or on the model's
weights is in `validation.py`. No torch here: a recipe can be read and checked in milliseconds.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from megatron_vlm.config.extensions import IN_PYTHON, import_extension, is_imported
from megatron_vlm.errors import ConfigError


def _no_switch(value: Any) -> Any:
    """Pydantic would take `steps: true` for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch_for_number", "a number is needed")
    return value


def _import(module: str, info: ValidationInfo) -> str:
    """Imports an extension, so that what it registers is there before anything is looked up by name. One that a
    checkpoint names is code of anybody: it must be there already, at the user's word."""
    is_trusted = info.context is None or info.context["is_trusted"]
    if not is_trusted and not is_imported(module):
        message = "is code that a checkpoint's word does not import: if you trust it, name it yourself, {how}"
        raise PydanticCustomError("untrusted_extension", message, {"how": f"--extensions {module} ({IN_PYTHON})"})
    try:
        import_extension(module)
    except ConfigError as error:
        message = "must be a module that Python can import, from here or from PYTHONPATH: {reason}"
        raise PydanticCustomError("extension", message, {"reason": str(error)}) from error
    return module


Number = BeforeValidator(_no_switch)
Extension = Annotated[str, AfterValidator(_import)]
PositiveInt = Annotated[int, Field(gt=0), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
RowLength = Annotated[int, Field(ge=2), Number]  # a token, and one that it predicts
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False), Number]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0.0, le=1.0), Number]
Share = Annotated[float, Field(ge=0.0, lt=1.0), Number]  # 1 would leave nothing for the rest
Beta = Annotated[float, Field(ge=0.0, lt=1.0), Number]  # 1 would divide by zero in Adam's bias correction

Plain = str | bool | int | Annotated[float, Field(allow_inf_nan=False)] | None | list[Any] | dict[str, Any]

TIME_TOKEN_NUMBER = "{t}"


class Section(BaseModel):
    """A frozen section that knows its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RuntimeConfig(Section):
    """Where and how the ranks run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: NonNegativeInt = 42
    timeout_seconds: PositiveInt = 600  # of a collective


class LanguageConfig(Section):
    """The language model: exactly one of `path` (directory or hub id, org/name@revision) and `config` (random
    weights)."""

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None  # directory or hub id (org/name@revision); default: `path`


class VisionCostConfig(Section):
    """What encoding a picture costs: linear * patches + quadratic * patches^2, in any unit."""

    linear: PositiveFloat
    quadratic: NonNegativeFloat = 0.0


class VisionConfig(Section):
    """The vision tower: exactly one of `path` (directory or hub id, org/name@revision) and `config`; `select_layer`
    counts hidden states, embeddings first."""

    path: str | None = None
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None  # in the place of these keys of the tower's own preprocessor config
    select_layer: Annotated[int, Number] = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"
    sharding: Literal["replicate"] = "replicate"
    cost: VisionCostConfig | None = None  # by which pictures are shared out over ranks; default: measured at start


class ProjectorConfig(Section):
    """The projector's registered name: identity | linear | mlpNx_gelu | mlp_downsample | mlp_downsample_2x2_fix |
    mlp_downsample_3x3_fix | cluster."""

    type: str = "mlp2x_gelu"


class TrainableConfig(Section):
    """Which components train."""

    language: bool = True
    vision: bool = False
    projector: bool = True


class ModelConfig(Section):
    """A vision-language model: family, parts, what trains."""

    family: str = "llava"
    language: LanguageConfig
    vision: VisionConfig
    projector: ProjectorConfig = ProjectorConfig()
    train: TrainableConfig = TrainableConfig()
    freeze: tuple[str, ...] = ()  # regexes over parameter names; one that matches nothing is an error


class ParallelConfig(Section):
    """How the ranks share the work; data parallelism is what is left of the world."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1  # model chunks per pipeline rank
    sequence: bool = False  # Megatron sequence parallelism, over the tensor ranks
    ulysses: PositiveInt = 1  # ranks that share a sequence and exchange it for heads in attention
    ring: PositiveInt = 1  # ranks that share a sequence and send each other keys and values in attention
    context: PositiveInt | None = None  # ulysses * ring where they are left at 1: how it is split is then chosen
    ring_mode: Literal["p2p", "all_gather"] = "p2p"  # all_gather: keys and values all at once, for short rings
    media_group: Literal["replica", "world"] = "replica"  # ranks that share the encoding of their pictures
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def replica(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor * self.pipeline * (self.context or self.ulysses * self.ring)


class VideoConfig(Section):
    """Which frames of a video are trained, each as a picture: `num_frames` spread evenly over it, fewer where it has
    fewer, or where these were more than `fps` a second (0: no such limit; a folder of frames has no seconds)."""

    num_frames: PositiveInt = 8
    fps: NonNegativeFloat = 0.0


class DataConfig(Section):
    """What is trained on and how it becomes tokens and pixels."""

    path: str
    source: str = "llava_json"  # a registered reader of `path` and evaluation.path
    media_root: str | None = None  # default: the folder of `path`
    template: str = "auto"
    template_arguments: dict[str, Plain] = {}  # variables of the tokenizer's chat template, and the day it sees
    render_turns: Literal["whole", "apart"] = "whole"  # apart: a conversation for each answer, which is its last
    image_mode: Literal["pad", "resize", "processor"] = "pad"  # processor: as the tower's own preprocessor config says
    image_token: str = "<image>"
    video: VideoConfig = VideoConfig()
    group_by_modality_length: bool = False  # batches of one modality and of similar lengths, as LLaVA samples
    packing: bool = False  # rows of training.sequence_length tokens, each of several samples
    pad_to_multiple_of: PositiveInt | None = (
        None  # tokens of unpacked rows, as far as they may; null: 64 on GPUs, else 1
    )
    on_long_sample: Literal["error", "truncate"] = "error"  # longer than training.sequence_length; pictures stay whole
    on_bad_sample: Literal["error", "skip"] = "error"
    num_workers: NonNegativeInt = 2
    shuffle: bool = True


class Fp8ExcludeConfig(Section):
    """Layers of the language model that are not in FP8: so many of the first and of the last."""

    first: NonNegativeInt = 0
    last: NonNegativeInt = 0


class PrecisionConfig(Section):
    """Number formats of the parameters, of the gradient reduction, and of the language model's linear layers.

    `fp8`: they multiply in FP8 while training, with one scale per tensor, made from the tensor itself (tensorwise) or
    from its history (delayed), or with one per block (blockwise). The head, the projector and the tower never do.
    """

    params: Literal["fp32", "bf16"] = "bf16"
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["tensorwise", "delayed", "blockwise"] | None = None
    fp8_gradients: Literal["e4m3", "e5m2"] = "e4m3"  # of layers' results; e5m2 has more range and a bit less
    fp8_exclude: Fp8ExcludeConfig = Fp8ExcludeConfig()
    fp8_backend: Literal["auto", "native", "transformer_engine"] = "auto"  # native: tensorwise, by our own kernels

    @property
    def needs_transformer_engine(self) -> bool:
        """Whether FP8 as asked for cannot do without it."""
        return self.fp8 is not None and (self.fp8 != "tensorwise" or self.fp8_backend == "transformer_engine")


class OptimizerConfig(Section):
    """AdamW, with an own peak rate per component where given."""

    name: Literal["adamw"] = "adamw"
    lr: NonNegativeFloat = 2.0e-5
    lr_projector: NonNegativeFloat | None = None
    lr_vision: NonNegativeFloat | None = None
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0  # of matrices; biases and norms are not decayed
    clip_norm: NonNegativeFloat = 1.0  # 0: no clipping
    distributed: bool = True  # states sharded over the data-parallel ranks


def _numbered(value: str) -> str:
    if TIME_TOKEN_NUMBER not in value:
        raise PydanticCustomError(
            "no_number", "must have {t} where the token's number stands", {"t": TIME_TOKEN_NUMBER}
        )
    return value


class TimeTokensConfig(Section):
    """Tokens that stand for moments, which the tokenizer has with consecutive ids: a label among them is trained as a
    normal distribution over all of them (LITA, VILA)."""

    format: Annotated[str, AfterValidator(_numbered)] = "<t{t}>"  # the name of token t, 0 .. count - 1
    count: PositiveInt
    std: PositiveFloat = 1.0  # of the distribution, in tokens

    def names(self) -> tuple[str, ...]:
        """Of all tokens, in order."""
        return tuple(self.format.replace(TIME_TOKEN_NUMBER, str(t)) for t in range(self.count))


class LossConfig(Section):
    """How the training loss, which is also the one that is logged, departs from the plain cross entropy per token.
    Held-out losses and scores are always the plain one."""

    z_loss: NonNegativeFloat = 0.0  # this much of logsumexp(logits)^2 is added; PaLM: 1e-4
    label_smoothing: Share = 0.0  # this share of the target is spread evenly over the vocabulary
    time_tokens: TimeTokensConfig | None = None


class ScheduleConfig(Section):
    """The learning rate over the steps, after a linear warm-up."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    min_lr: NonNegativeFloat = 0.0


class RecomputeConfig(Section):
    """Activations computed again in the backward pass, by component."""

    language: Literal["none", "selective", "full"] = "none"
    vision: Literal["none", "full", "encoder"] = "none"  # full: each layer again; encoder: all that trains


class TrainingConfig(Section):
    """The step: batch, length, number."""

    mode: Literal["train", "eval", "train_and_eval"] = "train"
    sequence_length: RowLength = 2048  # longest row, in tokens, pictures included; padded to what the ranks can cut
    global_batch_size: PositiveInt = 128  # rows per step over all ranks
    micro_batch_size: PositiveInt = 1
    steps: PositiveInt
    media_window: PositiveInt | None = None  # micro-batches encoded ahead per pipeline run; default: all
    media_batch: PositiveInt | None = None  # pictures that a rank encodes at a time; default: all of its window's
    recompute: RecomputeConfig = RecomputeConfig()
    max_nonfinite_steps: PositiveInt = 10  # updates left out in a row, for gradients not finite, before the run stops


class CheckpointConfig(Section):
    """Where checkpoints go and what a run starts from."""

    directory: str
    every_steps: NonNegativeInt = 0  # 0: only after the last step
    keep: PositiveInt | None = None  # newest checkpoints kept; default: all
    async_save: bool = True  # written by a process of its own while training goes on
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest good checkpoint in `directory`
    accept_changes: tuple[str, ...] = ()  # recipe keys (or sections) that may differ from the checkpoint's on resume
    load: str | None = None  # where a run starts that has nothing to resume: a checkpoint, or a directory of them
    load_states: Literal["all", "model"] = "all"  # model: weights only, for a new training phase


class EvaluationConfig(Section):
    """Held-out data: the loss over all of it, and a task's score where one is named."""

    path: str | None = None
    media_root: str | None = None  # default: the folder of `path`
    every_steps: NonNegativeInt = 0  # 0: only after the last step
    task: str | None = None  # a registered task, answered by generation
    max_new_tokens: PositiveInt = 32


class LoggingConfig(Section):
    """What the run tells while it works."""

    every_steps: PositiveInt = 1
    progress: bool = True
    curves: bool = True  # loss curve PNG beside the checkpoints
    tensorboard: bool = True  # event files in <checkpoint.directory>/tensorboard
    sample_ids: bool = False  # the ids of every step's samples, in metrics.jsonl
    ranks_every_steps: NonNegativeInt = 50  # time by phase and memory, compared over the ranks; 0: never


LayerBackend = Literal["auto", "reference", "torch", "triton"]


class OpsConfig(Section):
    """Backend per hot operation; `auto` takes the fastest that can run and says so once."""

    attention: Literal["auto", "reference", "cpu", "triton", "cudnn", "flash_attn"] = "auto"
    norm: LayerBackend = "auto"  # RMSNorm, and the residual addition before the one between attention and MLP
    activation: LayerBackend = "auto"  # the MLP's gate
    rope: LayerBackend = "auto"
    projector: LayerBackend = "auto"  # of projectors made of several operations
    fp8_quantise: Literal["auto", "triton", "reference"] = "auto"  # of precision.fp8_backend: native
    loss_chunk_tokens: PositiveInt = 1024  # whose logits exist at one time, at most (ops/cross_entropy.py)

    def anywhere(self) -> "OpsConfig":
        """The same with every backend left to the machine: weights may be used on another one than trained them."""
        return self.model_copy(update={name: "auto" for name, value in self if isinstance(value, str)})


class Config(Section):
    """A whole recipe. `extensions`: modules of your own that register what the recipe names (examples/extensions); they
    are imported when the recipe is read, by every process that reads it. A checkpoint keeps their names, and whoever
    loads it names them again (`--extensions`)."""

    runtime: RuntimeConfig = RuntimeConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    ops: OpsConfig = OpsConfig()
    extensions: tuple[Extension, ...] = ()

    def used_ops(self) -> dict[str, Any]:
        """`ops` without what does nothing in this recipe."""
        return self.ops.model_dump(exclude={"fp8_quantise"} if self.precision.fp8 is None else set())
