"""All rules together: validity beyond single keys, keys without effect, and changes on a resume.

The rules are in a file per section. Everything is pure, so it runs before any process group or weight exists, in
milliseconds, and all violations come in one error. What is known only from the model's own configuration, its
parameter names or the installed packages arrives as `ModelFacts`, gathered above (models/facts.py).
"""

from megatron_vlm.config.rules import (
    checkpoint,
    data,
    evaluation,
    extensions,
    logging,
    loss,
    model,
    ops,
    optimizer,
    parallel,
    precision,
    runtime,
    schedule,
    training,
)
from megatron_vlm.config.rules.base import ModelFacts
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError, RecipeError

SECTIONS = tuple(
    module.RULES
    for module in (
        runtime, model, parallel, data, precision, optimizer, loss, schedule, training, checkpoint, evaluation,
        logging, ops, extensions,
    )
)  # fmt: skip
MAY_CHANGE = {key: may for section in SECTIONS for key, may in section.may_change.items()}
ALIKE = {key: values for section in SECTIONS for key, values in section.alike.items()}


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
    violations = [one for section in SECTIONS for rule in section.recipe_rules for one in rule.check(config)]
    violations += [one for section in SECTIONS for rule in section.rank_rules for one in rule.check(config, world_size)]
    if facts is not None:
        violations += [one for section in SECTIONS for rule in section.model_rules for one in rule.check(config, facts)]
    if violations:
        raise RecipeError(violations)


def validate_layout(config: Config, facts: ModelFacts, world_size: int) -> None:
    """The rules over how ranks share a model, and no others: what a finished model is loaded in need not be what its
    recipe was trained in. Raises ConfigError as `validate` does."""
    violations = list(parallel.layout_violations(config, facts, world_size))
    if violations:
        raise ConfigError("; ".join(violations))


def unused_keys(config: Config, facts: ModelFacts, world_size: int) -> list[str]:
    """Lists what a valid recipe sets without effect: `keys: without effect, as reason`, a line for each reason.

    Such a key may wait for another model, or for more ranks; whoever set it expects something, and is told.

    Args:
        config: a valid recipe, its `parallel.context` split (`context.split_context`).
        facts: of its model.
        world_size: number of ranks.
    """
    rules = [rule for section in SECTIONS for rule in section.unused_rules]
    found = [one for rule in rules for one in rule.check(config, facts, world_size)]
    return [f"{keys}: without effect, as {reason}" for keys, reason in found]


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a key: as its own entry says, else the nearest section's."""
    while key not in MAY_CHANGE:
        key, dot, _ = key.rpartition(".")
        assert dot, "a test checks that every key is decided on"
    return MAY_CHANGE[key]


def are_alike(key: str, before: object, now: object) -> bool:
    """Whether a resumed run learns the same with either value of a key."""
    return before == now or (key in ALIKE and before in ALIKE[key] and now in ALIKE[key])


def told_at(key: str) -> list[str]:
    """The sentences of all rules over a key, whichever section's they are."""
    return [text for section in SECTIONS for text in section.told_at(key)]
