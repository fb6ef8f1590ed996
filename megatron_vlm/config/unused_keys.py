"""What a recipe sets and what does nothing in it, or no good: told as warnings, for whoever set it expects something.

A recipe that names such a key is valid: the key may wait for another model, or for more ranks.
"""

from collections.abc import Iterator

from megatron_vlm.config.schema import Config
from megatron_vlm.config.validation import ModelFacts, trains


def unused_keys(config: Config, facts: ModelFacts, world_size: int) -> list[str]:
    """`keys: without effect, as reason`, a line for each reason.

    Args:
        config: a valid recipe, its `parallel.context` split (`context.split_context`).
        facts: of its model.
        world_size: number of ranks.
    """
    found = [*_fp8(config), *_rows(config), *_recomputation(config, facts), *_sharing(config, world_size)]
    return [f"{keys}: without effect, as {reason}" for keys, reason in found]


def frozen_at_random(config: Config, facts: ModelFacts) -> list[str]:
    """Parts that start from random weights of which some never train, so that they stay noise: a line for each, by name
    and with what to do. Of a run that starts from no checkpoint, where the projector is always new."""
    told, paths = [], {"language": config.model.language.path, "vision": config.model.vision.path, "projector": None}
    for component, path in paths.items():
        names = facts.parameter_names[component]
        frozen = [name for name in names if not trains(component, name, config.model)]
        if path is not None or not frozen:
            continue
        is_off = not getattr(config.model.train, component)
        by = f"model.train.{component} false" if is_off else f"model.freeze {list(config.model.freeze)}"
        these = "all" if len(frozen) == len(names) else f"{len(frozen)} of {len(names)}"
        name_it = "" if component == "projector" else f"name trained ones (model.{component}.path), "
        told.append(
            f"{by}: {these} parameters of model.{component} start from random weights and keep them; {name_it}start "
            "from a checkpoint (checkpoint.load) or let them train"
        )
    return told


def unused_fp8_keys(config: Config) -> list[str]:
    """Keys that only FP8 reads, without FP8."""
    if config.precision.fp8 is not None:
        return []
    keys = (
        ("precision", ("fp8_backend", "fp8_gradients", "fp8_exclude")),
        ("ops", ("fp8_quantise",)),
    )
    unused = []
    for name, of_fp8 in keys:
        section = getattr(config, name)
        default = type(section)()
        unused += [f"{name}.{key}" for key in of_fp8 if getattr(section, key) != getattr(default, key)]
    return unused


def _fp8(config: Config) -> Iterator[tuple[str, str]]:
    if unused := unused_fp8_keys(config):
        yield ", ".join(unused), "precision.fp8 is null"


def _rows(config: Config) -> Iterator[tuple[str, str]]:
    """Rows of held-out samples are never packed."""
    data = config.data
    evaluates = config.evaluation.path is not None and config.training.mode != "train"
    if data.packing and data.pad_to_multiple_of is not None and not evaluates:
        yield "data.pad_to_multiple_of", "packed rows have training.sequence_length tokens"


def _recomputation(config: Config, facts: ModelFacts) -> Iterator[tuple[str, str]]:
    """`full` is of the tower's layers, `encoder` of tower and projector, or of the projector alone where the tower is
    frozen (models/vision/encoder.py). What has no gradient keeps nothing anyway."""
    mode = config.training.recompute.vision
    parts = {"none": {}, "full": {"vision": "tower"}, "encoder": {"vision": "tower", "projector": "projector"}}[mode]
    if parts and not any(trains(part, name, config.model) for part in parts for name in facts.parameter_names[part]):
        yield f"training.recompute.vision {mode}", f"no parameter of the {' and the '.join(parts.values())} trains"


def _sharing(config: Config, world_size: int) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.ring_mode == "all_gather" and parallel.ring == 1:
        yield "parallel.ring_mode all_gather", "there is no ring (parallel.ring is 1)"
    if parallel.media_group == "world" and world_size == parallel.replica:
        yield "parallel.media_group world", "all ranks are one data-parallel replica"
