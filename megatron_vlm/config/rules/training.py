"""Rules over `training`: how its batch is cut, how long its rows are, and what is worth computing again.

Hazard: a rule missing here shows later as a hang or, worse, as a silently wrong result: megatron-core's interleaved
schedule with a ragged last round, say.
"""

from collections.abc import Iterator

from megatron_vlm.config.packing import packing_of
from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.rules.model import trains
from megatron_vlm.config.schema import Config

RULES = SectionRules(
    "training",
    may_change={
        "training.mode": True,
        "training.sequence_length": False,
        "training.global_batch_size": False,
        "training.micro_batch_size": True,
        "training.steps": False,  # the schedule's end
        "training.epochs": False,  # compared as the steps that it comes to
        "training.media_window": True,
        "training.media_batch": True,
        "training.recompute": True,
        "training.max_nonfinite_steps": True,
    },
)


@RULES.of_ranks(
    "training.global_batch_size",
    "training.micro_batch_size",
    says="`training.global_batch_size` must be a multiple of `training.micro_batch_size` times the data-parallel "
    "ranks, unless rows are laid out anew in each step (`data.packing: samples`)",
)
def _batch(config: Config, world_size: int) -> Iterator[str]:
    """Speaks only where the number of data-parallel ranks is known, that is where the ranks can be divided."""
    parallel, training = config.parallel, config.training
    data, rest = divmod(world_size, parallel.replica)
    if rest or packing_of(config) == "samples":
        return
    rows = data * training.micro_batch_size
    if training.global_batch_size % rows:
        yield (
            f"training.global_batch_size: found {training.global_batch_size}, needs a multiple of {rows} "
            f"({data} data-parallel ranks x training.micro_batch_size {training.micro_batch_size})"
        )


@RULES.of_ranks(
    "training.global_batch_size",
    "training.media_window",
    "parallel.virtual_pipeline",
    says="a pipeline that is interleaved (`parallel.virtual_pipeline` above 1), or one of several media windows, takes "
    "a multiple of `parallel.pipeline` micro-batches; with `data.packing: samples` a step is laid out so, and the "
    "window alone must be one",
)
def _schedule(config: Config, world_size: int) -> Iterator[str]:
    """Every run of a pipeline that is interleaved, or one of several, takes a multiple of its stages: megatron-core's
    interleaved schedule refuses a ragged last round, and each run of its own pays a bubble of that length. Silent
    where `_batch` speaks. Where rows are laid out by the step, as many micro-batches as samples are the most."""
    data, rest = divmod(world_size, config.parallel.replica)
    rows, lays_out = data * config.training.micro_batch_size, packing_of(config) == "samples"
    if rest or (config.training.global_batch_size % rows and not lays_out):
        return
    stages = config.parallel.pipeline
    num_micro_batches = -(-config.training.global_batch_size // rows)
    if lays_out:
        num_micro_batches = max(stages, num_micro_batches)
    window = config.training.media_window or num_micro_batches
    several = window < num_micro_batches
    if config.parallel.virtual_pipeline > 1 and stages == 1:
        yield (
            f"parallel.virtual_pipeline: found {config.parallel.virtual_pipeline} with parallel.pipeline 1, "
            "needs parallel.pipeline > 1 or 1"
        )
    if several and window % stages:
        yield f"training.media_window: found {window}, needs a multiple of parallel.pipeline {stages}, or null"
    if (several or config.parallel.virtual_pipeline > 1) and num_micro_batches % stages and not lays_out:
        reason = "a virtual pipeline" if config.parallel.virtual_pipeline > 1 else "the last media window"
        yield (
            f"training.global_batch_size: found {config.training.global_batch_size} = {num_micro_batches} "
            f"micro-batches per rank, {reason} needs a multiple of parallel.pipeline {stages}, "
            f"a multiple of {rows * stages} rows"
        )


@RULES.of_model("training.sequence_length", says="must be more than the tokens of one image")
def _images(config: Config, facts: ModelFacts) -> Iterator[str]:
    if config.training.sequence_length <= facts.tokens_per_image:
        yield (
            f"training.sequence_length: found {config.training.sequence_length}, needs more than the "
            f"{facts.tokens_per_image} tokens of one image"
        )


@RULES.unused("training.recompute.vision", says="without effect where nothing that it names trains")
def _recomputation(config: Config, facts: ModelFacts, world_size: int) -> Iterator[tuple[str, str]]:
    """`full` is of the tower's layers, `encoder` of tower and projector, or of the projector alone where the tower is
    frozen (models/vision/encoder.py). What has no gradient keeps nothing anyway."""
    mode = config.training.recompute.vision
    parts = {"none": {}, "full": {"vision": "tower"}, "encoder": {"vision": "tower", "projector": "projector"}}[mode]
    if parts and not any(trains(part, name, config.model) for part in parts for name in facts.parameter_names[part]):
        yield f"training.recompute.vision {mode}", f"no parameter of the {' and the '.join(parts.values())} trains"
