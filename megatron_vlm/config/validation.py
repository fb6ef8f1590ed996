"""What makes a recipe valid beyond its single fields: rules over several keys, the number of ranks and the model.

Everything here is pure, so it runs before any process group or weight exists, in milliseconds, and all violations come
in one error. What is known only from the model's own configuration, its parameter names or the installed packages
arrives as `ModelFacts`, gathered above (models/facts.py). A rule yields `key: found value, values allowed`.

Hazard: a rule missing here shows later as a hang or, worse, as a silently wrong result: megatron-core's interleaved
schedule with a ragged last round, say.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_vlm.config.packages import PACKAGES, TRANSFORMER_ENGINE
from megatron_vlm.config.recipe_changes import unknown_changes
from megatron_vlm.config.schema import Config, LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.errors import ConfigError, RecipeError, one_line
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.limits import LimitError, bounded

REGEX_SECONDS = 2.0  # of processor time, for all names: an honest one takes milliseconds
FP8_CHANNELS = 16  # what Transformer Engine's FP8 GEMMs need a layer's sides to be multiples of


@dataclass(frozen=True)
class ModelFacts:
    """What the rules must know of the model and of this installation."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int  # rows of the embedding table, unpadded
    vision_num_layers: int  # encoder layers of the whole tower
    tokens_per_image: int
    parameter_names: Mapping[str, tuple[str, ...]]  # global, of language, vision (what is reached) and projector
    families: tuple[str, ...]
    projectors: tuple[str, ...]
    templates: tuple[str, ...]
    tasks: tuple[str, ...]
    installed: frozenset[str]  # as config.packages names them
    context_tokens: int | None = None  # positions that the language model knows, where its config says so
    backend_obstacles: tuple[str, ...] = ()  # why backends named under `ops` cannot run, where the device is known


def validate(config: Config, facts: ModelFacts | None, world_size: int) -> None:
    """Checks every rule.

    Args:
        config: the recipe.
        facts: of its model; None where the recipe does not say which model (`names_its_model`), then the rules over
            recipe and ranks alone are checked, among them that one.
        world_size: number of ranks.

    Raises:
        ConfigError: all violations, on one line.
    """
    violations = [violation for rule in RECIPE_RULES for violation in rule(config)]
    violations += [violation for rule in RANK_RULES for violation in rule(config, world_size)]
    if facts is not None:
        violations += [violation for rule in MODEL_RULES for violation in rule(config, facts)]
    if violations:
        raise RecipeError(violations)


def validate_layout(config: Config, facts: ModelFacts, world_size: int) -> None:
    """The rules over how ranks share a model, and no others: what a finished model is loaded in need not be what its
    recipe was trained in. Raises ConfigError as `validate` does."""
    violations = [*_world(config, world_size), *_tensor_split(config, facts), *_pipeline_split(config, facts)]
    if violations:
        raise ConfigError("; ".join(violations))


def names_its_model(model: ModelConfig) -> bool:
    """Whether tower and language model each have exactly one source, so that facts can be gathered."""
    return all((part.path is None) != (part.config is None) for part in (model.language, model.vision))


def trains(component: str, name: str, model: ModelConfig) -> bool:
    """Whether a parameter trains: its component (language, vision, projector) is switched on, and no `model.freeze`
    regex matches anywhere in its global name."""
    return getattr(model.train, component) and not any(re.search(pattern, name) for pattern in model.freeze)


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a `model.freeze` regex matches anywhere in one of the names.

    Raises:
        ConfigError: it is none, or one that backtracks for ever.
    """
    try:
        return bounded(lambda: any(re.search(pattern, name) for name in names), seconds=REGEX_SECONDS)
    except LimitError as error:
        raise ConfigError(f"whose matching does not end: {error}; needs one without nested repetitions") from error
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"not a regular expression ({one_line(error)})") from error


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


# Rules over the recipe alone.


def _one_source_each(config: Config) -> Iterator[str]:
    parts: dict[str, LanguageConfig | VisionConfig] = {
        "model.language": config.model.language,
        "model.vision": config.model.vision,
    }
    for key, part in parts.items():
        if part.path is None and part.config is None:
            yield f"{key}: found neither path nor config, needs exactly one of them"
        if part.path is not None and part.config is not None:
            yield f"{key}: found both path {part.path!r} and config, needs exactly one of them (the other: null)"


def _tokenizer(config: Config) -> Iterator[str]:
    language = config.model.language
    if language.path is None and language.config is not None and language.tokenizer is None:
        yield "model.language.tokenizer: found null with model.language.config, needs a directory or hub id"


def _sequence(config: Config) -> Iterator[str]:
    if config.parallel.sequence and config.parallel.tensor == 1:
        yield "parallel.sequence: found true with parallel.tensor 1, needs parallel.tensor > 1 or false"


def _context(config: Config) -> Iterator[str]:
    """A recipe written out has 1 for both, so 1 is as good as nothing."""
    parallel = config.parallel
    given = {name: ranks for name in ("ulysses", "ring") if (ranks := getattr(parallel, name)) > 1}
    if parallel.context is not None and given:
        found = " and ".join(f"parallel.{name} {ranks}" for name, ranks in given.items())
        yield (
            f"parallel.context: found {parallel.context} with {found}, which it chooses itself, needs them 1, or null"
        )


def _cudnn_in_a_ring(config: Config) -> Iterator[str]:
    """What a ring rank has of a document is known only when it is read."""
    parallel = config.parallel
    if config.ops.attention != "cudnn" or parallel.ring == 1:
        return
    elsewise = "needs auto, triton or flash_attn, or parallel.ulysses alone"
    if parallel.ring_mode == "all_gather":
        yield (
            f"ops.attention: found cudnn with parallel.ring {parallel.ring} and parallel.ring_mode all_gather, where a "
            f"rank's queries see more keys than they are, while cuDNN's causal mask is of a square, {elsewise}, or p2p"
        )
    elif config.data.packing:
        yield (
            f"ops.attention: found cudnn with parallel.ring {parallel.ring} and data.packing true, where a rank's part "
            f"of a document may be a single token, which cuDNN does not take, {elsewise}"
        )


def _overlap(config: Config) -> Iterator[str]:
    if not config.parallel.overlap_param_gather:
        return
    if not config.optimizer.distributed:
        yield "parallel.overlap_param_gather: found true with optimizer.distributed false, needs it true"
    if not config.parallel.overlap_grad_reduce:
        yield "parallel.overlap_param_gather: found true with parallel.overlap_grad_reduce false, needs it true"


def _grad_reduce(config: Config) -> Iterator[str]:
    if config.precision.params == "fp32" and config.precision.grad_reduce != "fp32":
        yield (
            f"precision.grad_reduce: found {config.precision.grad_reduce} with precision.params fp32, "
            "needs fp32: gradients are never narrower than the parameters"
        )


def _fp8(config: Config) -> Iterator[str]:
    precision, exclude = config.precision, config.precision.fp8_exclude
    if precision.fp8 not in (None, "tensorwise"):
        if precision.fp8_backend == "native":
            yield (
                f"precision.fp8: found {precision.fp8} with precision.fp8_backend native, which scales each tensor by "
                "its own largest number, needs tensorwise, or precision.fp8_backend transformer_engine"
            )
        elif config.runtime.device == "cpu":
            yield (
                f"precision.fp8: found {precision.fp8} with runtime.device cpu, where Transformer Engine cannot run, "
                "needs tensorwise or null"
            )
    elif precision.needs_transformer_engine and config.runtime.device == "cpu":
        yield (
            "precision.fp8_backend: found transformer_engine with runtime.device cpu, where it cannot run, "
            "needs native or auto"
        )
    if precision.fp8 == "delayed" and exclude.first + exclude.last:
        yield (
            f"precision.fp8_exclude: found first {exclude.first}, last {exclude.last} with precision.fp8 delayed, "
            "whose history megatron-core keeps for all layers or none, needs 0 and 0, or tensorwise or blockwise"
        )


def _grouping(config: Config) -> Iterator[str]:
    if config.data.group_by_modality_length and not config.data.shuffle:
        yield "data.group_by_modality_length: found true with data.shuffle false, which keeps file order, needs it true"
    if config.data.group_by_modality_length and config.data.packing:
        yield (
            "data.group_by_modality_length: found true with data.packing true, which leaves no padding to save, "
            "needs one of them false"
        )


def _load_states(config: Config) -> Iterator[str]:
    if config.checkpoint.load_states == "model" and config.checkpoint.load is None:
        yield "checkpoint.load_states: found model with checkpoint.load null, needs a checkpoint to load, or all"


def _evaluation(config: Config) -> Iterator[str]:
    """With mode train a path and a task may stand in the recipe unused, so that one key switches evaluation off."""
    evaluation, mode = config.evaluation, config.training.mode
    if mode != "train" and evaluation.path is None:
        yield f"evaluation.path: found null with training.mode {mode}, needs a data file, or training.mode train"
    if mode == "train" and evaluation.every_steps:
        yield (
            f"evaluation.every_steps: found {evaluation.every_steps} with training.mode train, which never evaluates, "
            "needs training.mode train_and_eval, or 0"
        )
    for key in ("task", "media_root"):
        found = getattr(evaluation, key)
        if found is not None and evaluation.path is None:
            yield f"evaluation.{key}: found {found!r} with evaluation.path null, needs a data file, or null"


# Rules over recipe and ranks.


def _world(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    if parallel.context is not None:
        sizes["context"] = parallel.context
    else:
        sizes |= {name: ranks for name in ("ulysses", "ring") if (ranks := getattr(parallel, name)) > 1}
    if world_size % parallel.replica:
        yield (
            f"{' * '.join(f'parallel.{name}' for name in sizes)}: found {' * '.join(map(str, sizes.values()))} = "
            f"{parallel.replica}, the world size {world_size} allows {_divisors(world_size)}, or start a multiple of "
            f"{parallel.replica} ranks (torchrun --nproc-per-node)"
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    """Speaks only where the number of data-parallel ranks is known, that is where `_world` is silent."""
    parallel, training = config.parallel, config.training
    data, rest = divmod(world_size, parallel.replica)
    if rest:
        return
    rows = data * training.micro_batch_size
    if training.global_batch_size % rows:
        yield (
            f"training.global_batch_size: found {training.global_batch_size}, needs a multiple of {rows} "
            f"({data} data-parallel ranks x training.micro_batch_size {training.micro_batch_size})"
        )
        return
    yield from _schedule(config, training.global_batch_size // rows, rows)


def _schedule(config: Config, num_micro_batches: int, rows: int) -> Iterator[str]:
    """Every run of a pipeline that is interleaved, or one of several, takes a multiple of its stages: megatron-core's
    interleaved schedule refuses a ragged last round, and each run of its own pays a bubble of that length."""
    stages, window = config.parallel.pipeline, config.training.media_window or num_micro_batches
    several = window < num_micro_batches
    if config.parallel.virtual_pipeline > 1 and stages == 1:
        yield (
            f"parallel.virtual_pipeline: found {config.parallel.virtual_pipeline} with parallel.pipeline 1, "
            "needs parallel.pipeline > 1 or 1"
        )
    if several and window % stages:
        yield f"training.media_window: found {window}, needs a multiple of parallel.pipeline {stages}, or null"
    if (several or config.parallel.virtual_pipeline > 1) and num_micro_batches % stages:
        reason = "a virtual pipeline" if config.parallel.virtual_pipeline > 1 else "the last media window"
        yield (
            f"training.global_batch_size: found {config.training.global_batch_size} = {num_micro_batches} "
            f"micro-batches per rank, {reason} needs a multiple of parallel.pipeline {stages}, "
            f"a multiple of {rows * stages} rows"
        )


# Rules over recipe and model.


def _tensor_split(config: Config, facts: ModelFacts) -> Iterator[str]:
    tensor = config.parallel.tensor
    quantities = {
        "attention heads": facts.num_attention_heads,
        "key-value heads": facts.num_query_groups,
        "feed-forward channels": facts.ffn_hidden_size,
    }
    undivided = [f"{number} {what}" for what, number in quantities.items() if number % tensor]
    if undivided:
        yield (
            f"parallel.tensor: found {tensor}, which does not divide the language model's {' and '.join(undivided)}, "
            f"allowed: {_divisors(math.gcd(*quantities.values()))}"
        )


def _pipeline_split(config: Config, facts: ModelFacts) -> Iterator[str]:
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if facts.num_layers % (stages * chunks):
        yield (
            f"parallel.pipeline * parallel.virtual_pipeline: found {stages} * {chunks} = {stages * chunks}, "
            f"the language model's {facts.num_layers} layers allow {_divisors(facts.num_layers)}"
        )


def _fp8_layers(config: Config, facts: ModelFacts) -> Iterator[str]:
    """What Transformer Engine and megatron-core would say later, each in its own words."""
    precision, exclude = config.precision, config.precision.fp8_exclude
    if precision.fp8 is None:
        return
    excluded = f"precision.fp8_exclude: found first {exclude.first}, last {exclude.last}"
    if exclude.first + exclude.last >= facts.num_layers:
        yield f"{excluded}, the language model has {facts.num_layers} layers, needs fewer, or precision.fp8 null"
        return
    if not (precision.needs_transformer_engine or _auto_takes_transformer_engine(config, facts)):
        return
    way_out = ", or precision.fp8_backend native" if precision.fp8 == "tensorwise" else ""
    per_stage = facts.num_layers // config.parallel.pipeline
    if max(exclude.first, exclude.last) > per_stage:
        yield f"{excluded}, megatron-core allows each at most the {per_stage} layers of a pipeline stage{way_out}"
    channels, tensor = facts.ffn_hidden_size, config.parallel.tensor
    if facts.hidden_size % FP8_CHANNELS or channels % (FP8_CHANNELS * tensor):
        yield (
            f"precision.fp8: found {precision.fp8} with a hidden size of {facts.hidden_size} and {channels} "
            f"feed-forward channels over parallel.tensor {tensor}, Transformer Engine needs multiples of "
            f"{FP8_CHANNELS} on every rank{way_out}"
        )


def _auto_takes_transformer_engine(config: Config, facts: ModelFacts) -> bool:
    """Whether `precision.fp8_backend: auto` takes it, or may: rules are checked on machines without a GPU, too, whose
    recipe says nothing of the device."""
    is_free = config.precision.fp8_backend == "auto" and config.runtime.device != "cpu"
    return is_free and TRANSFORMER_ENGINE in facts.installed


def _images(config: Config, facts: ModelFacts) -> Iterator[str]:
    layer, num_layers = config.model.vision.select_layer, facts.vision_num_layers
    if not -num_layers - 1 <= layer <= num_layers:
        yield (
            f"model.vision.select_layer: found {layer}, the tower's {num_layers} layers allow "
            f"{-num_layers - 1} to {num_layers}"
        )
    if config.training.sequence_length <= facts.tokens_per_image:
        yield (
            f"training.sequence_length: found {config.training.sequence_length}, one image alone takes "
            f"{facts.tokens_per_image} tokens, needs more"
        )


def _names(config: Config, facts: ModelFacts) -> Iterator[str]:
    choices = {
        "model.family": (config.model.family, facts.families),
        "model.projector.type": (config.model.projector.type, facts.projectors),
        "data.template": (config.data.template, facts.templates),
    }
    if config.evaluation.task is not None:
        choices["evaluation.task"] = (config.evaluation.task, facts.tasks)
    for key, (name, known) in choices.items():
        if name in known:
            continue
        allowed = f"allowed: {', '.join(known)}"
        yield f"{key}: found {name!r}, {did_you_mean(name, known, allowed)}"


def _freezing(config: Config, facts: ModelFacts) -> Iterator[str]:
    """Silent where the projector is unknown, and so the names of its parameters: `_names` speaks then."""
    if config.model.projector.type not in facts.projectors:
        return
    names = [(component, name) for component, known in facts.parameter_names.items() for name in known]
    broken = False
    for position, pattern in enumerate(config.model.freeze):
        try:
            found = matches(pattern, [name for _, name in names])
        except ConfigError as error:
            broken = True
            yield f"model.freeze[{position}]: found {pattern!r}, {error}"
            continue
        if not found:
            yield (
                f"model.freeze[{position}]: found {pattern!r}, which matches no parameter, "
                f"needs one that matches a name like {_examples(facts)}"
            )
    if not broken and not any(trains(component, name, config.model) for component, name in names):
        train = ", ".join(f"{part} {str(on).lower()}" for part, on in config.model.train)
        frozen = f" and model.freeze {list(config.model.freeze)}" if config.model.freeze else ""
        yield f"model.train: found {train}{frozen}, which leaves no parameter to train, needs at least one"


def _examples(facts: ModelFacts) -> str:
    return " or ".join(repr(names[-1]) for names in facts.parameter_names.values() if names)


def _backends(config: Config, facts: ModelFacts) -> Iterator[str]:
    yield from facts.backend_obstacles


def _packages(config: Config, facts: ModelFacts) -> Iterator[str]:
    for package in PACKAGES:
        if package.needed_by(config) and package.name not in facts.installed:
            what = package.requirement.partition(">=")[0]
            state = f"missing or older than {package.minimum}" if package.minimum else "missing"
            install = f"'{package.requirement}'" if package.minimum else what
            yield f"{package.reason}: package {what} is {state}, install it: pip install {install}"


RECIPE_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _one_source_each,
    _tokenizer,
    _sequence,
    _context,
    _cudnn_in_a_ring,
    _overlap,
    _grad_reduce,
    _fp8,
    _grouping,
    _load_states,
    unknown_changes,
    _evaluation,
)
RANK_RULES: tuple[Callable[[Config, int], Iterator[str]], ...] = (_world, _batch)
MODEL_RULES: tuple[Callable[[Config, ModelFacts], Iterator[str]], ...] = (
    _tensor_split,
    _pipeline_split,
    _fp8_layers,
    _images,
    _names,
    _freezing,
    _backends,
    _packages,
)
