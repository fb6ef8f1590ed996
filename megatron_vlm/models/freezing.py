"""Freezing: by component (`model.train`) and by regex over global parameter names (`model.freeze`).

The decision is a pure function of the name, so that every rank, and validation before any rank exists, comes to one and
the same. Parameters of the tower that the selected hidden state does not reach never train, whatever the recipe says.

Must run before the model is wrapped in DDP, which looks at `requires_grad` once.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron_vlm.config.rules import REGEX_SECONDS, trains
from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.runtime.limits import LimitError, bounded
from megatron_vlm.runtime.logging import get_logger

COMPONENTS = ("language", "vision", "projector")


@dataclass(frozen=True)
class TrainableCount:
    """Numbers in one component, on one rank: parameters (scalars) and those of them that train."""

    total: int
    trainable: int


def component_of(name: str) -> str:
    """`vision.encoder.layers.0...` -> `vision`."""
    component = name.partition(".")[0]
    assert component in COMPONENTS, name
    return component


def trainable_names(names: Iterable[str], model: ModelConfig, unreached: Collection[str] = ()) -> set[str]:
    """The global names among `names` that train.

    Args:
        names: global parameter names.
        model: the recipe's model section.
        unreached: global names that the selected hidden state does not depend on.

    Raises:
        ConfigError: the matching of a regex does not end.
    """
    known = list(names)
    try:
        return bounded(
            lambda: {name for name in known if name not in unreached and trains(component_of(name), name, model)},
            seconds=REGEX_SECONDS * (1 + len(model.freeze)),
        )
    except LimitError as error:
        raise ConfigError(f"model.freeze: found {list(model.freeze)}, whose matching does not end: {error}") from error


def apply_freezing(model: VisionLanguageModel, config: ModelConfig) -> dict[str, TrainableCount]:
    """Sets `requires_grad` of every parameter on this rank, logs and returns the counts per component.

    A regex that matches nothing is an error of the whole model, not of one rank's part: `config.rules` find it.
    """
    parameters = list(model.named_parameters())
    unreached = {f"vision.{name}" for name in model.vision.tower.survey.unreached}
    trainable = trainable_names((name for name, _ in parameters), config, unreached)
    for name, parameter in parameters:
        parameter.requires_grad_(name in trainable)
    model.vision.train(model.vision.training)  # a tower that is now frozen leaves training mode
    counts = {}
    for component in COMPONENTS:
        mine = [(name, parameter.numel()) for name, parameter in parameters if component_of(name) == component]
        counts[component] = TrainableCount(sum(n for _, n in mine), sum(n for name, n in mine if name in trainable))
    summary = ", ".join(f"{name} {count.trainable:,} of {count.total:,}" for name, count in counts.items())
    get_logger(__name__).info("trainable parameters on this rank: %s", summary)
    return counts
