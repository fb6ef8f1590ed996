"""Rules over `model`: where its parts come from, what they are called, and that something trains.

Hazard: a regular expression of the user's may backtrack for ever, so its matching is bounded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.schema import Config, LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.errors import ConfigError, one_line
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.limits import LimitError, bounded

REGEX_SECONDS = 2.0  # of processor time, for all names: an honest one takes milliseconds

RULES = SectionRules(
    "model",
    may_change={
        "model": False,
        "model.vision.sharding": True,
        "model.vision.cost": True,  # who encodes what, and nothing of the result
    },
)


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


def unknown_name(key: str, name: str, known: Sequence[str]) -> Iterator[str]:
    """A violation where a name is none of those registered, with the nearest."""
    if name not in known:
        allowed = f"allowed: {', '.join(known)}"
        yield f"{key}: found {name!r}, {did_you_mean(name, known, allowed)}"


@RULES.of_recipe(
    "model.language.path",
    "model.language.config",
    "model.vision.path",
    "model.vision.config",
    says="exactly one of `path` and `config` is given",
)
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


@RULES.of_recipe("model.language.tokenizer", says="must be given with `model.language.config`")
def _tokenizer(config: Config) -> Iterator[str]:
    language = config.model.language
    if language.path is None and language.config is not None and language.tokenizer is None:
        yield "model.language.tokenizer: found null with model.language.config, needs a directory or hub id"


@RULES.of_model("model.vision.select_layer", says="must be a hidden state that the tower has")
def _select_layer(config: Config, facts: ModelFacts) -> Iterator[str]:
    layer, num_layers = config.model.vision.select_layer, facts.vision_num_layers
    if not -num_layers - 1 <= layer <= num_layers:
        yield (
            f"model.vision.select_layer: found {layer}, the tower's {num_layers} layers allow "
            f"{-num_layers - 1} to {num_layers}"
        )


@RULES.of_model("model.family", says="must be a registered family")
def _family(config: Config, facts: ModelFacts) -> Iterator[str]:
    yield from unknown_name("model.family", config.model.family, facts.families)


@RULES.of_model("model.projector.type", says="must be a registered projector")
def _projector(config: Config, facts: ModelFacts) -> Iterator[str]:
    yield from unknown_name("model.projector.type", config.model.projector.type, facts.projectors)


@RULES.of_model(
    "model.freeze",
    "model.train.language",
    "model.train.vision",
    "model.train.projector",
    says="at least one parameter must train, and every regular expression of `model.freeze` must match a name",
)
def _freezing(config: Config, facts: ModelFacts) -> Iterator[str]:
    """Silent where the projector is unknown, and so the names of its parameters: `_projector` speaks then."""
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
                f"needs one that matches a name like {_examples(facts.parameter_names)}"
            )
    if not broken and not any(trains(component, name, config.model) for component, name in names):
        train = ", ".join(f"{part} {str(on).lower()}" for part, on in config.model.train)
        frozen = f" and model.freeze {list(config.model.freeze)}" if config.model.freeze else ""
        yield f"model.train: found {train}{frozen}, which leaves no parameter to train, needs at least one"


def _examples(parameter_names: Mapping[str, tuple[str, ...]]) -> str:
    return " or ".join(repr(names[-1]) for names in parameter_names.values() if names)
