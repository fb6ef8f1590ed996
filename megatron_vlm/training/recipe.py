"""A recipe made ready for its ranks: its model described, what it leaves open chosen, every rule checked.

Here the layers' knowledge meets (DESIGN D12): validation is pure and knows no model, no template and no task by itself.
"""

from dataclasses import dataclass

import torch

from megatron_vlm.config.context import split_context
from megatron_vlm.config.packing import settle_packing
from megatron_vlm.config.rules import ModelFacts, names_its_model, unused_keys, validate
from megatron_vlm.config.schema import Config
from megatron_vlm.data.text.conversation import TEMPLATES
from megatron_vlm.errors import ConfigError, RecipeError, together
from megatron_vlm.evaluation.tasks import TASKS
from megatron_vlm.models.description import ModelDescription, describe_model
from megatron_vlm.models.facts import gather_facts
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe in which nothing was found wrong.

    Args:
        config: as it runs, its `parallel.context` null and its `data.packing` not auto.
        model: its model.
        facts: what the rules know of that.
    """

    config: Config
    model: ModelDescription
    facts: ModelFacts


def resolve_recipe(
    config: Config, world_size: int, ranks_per_node: int, device: torch.device | None = None
) -> ResolvedRecipe:
    """Describes a recipe's model, checks all its rules, splits `parallel.context` into Ulysses and ring ranks, which it
    tells with its reason, and takes a packing of rows for `auto`.

    Args:
        ranks_per_node: consecutive ranks that share a machine; equal on all ranks, or they build different grids.
        device: what they compute on, so that backends the recipe names are asked; None where that is not known here.

    Raises:
        ConfigError: everything wrong with the recipe, in one error.
    """
    model, facts, errors = None, None, []
    if names_its_model(config.model):
        try:
            model = describe_model(config.model, is_validated=False)
            facts = gather_facts(config, TEMPLATES.names(), TASKS.names(), device, model)
        except ConfigError as error:  # the rules that need none are checked all the same
            errors.append(error)
    try:
        validate(config, facts, world_size)
    except ConfigError as error:
        errors.append(error)
    if errors:
        raise together(errors, RecipeError)
    assert model is not None and facts is not None, "validate refuses a recipe that does not name its model"
    if config.parallel.context is not None:
        parallel, reason = split_context(config.parallel, facts.num_attention_heads, ranks_per_node)
        logger.info("%s", reason)
        config = config.model_copy(update={"parallel": parallel})
        validate(config, facts, world_size)  # again, now that it is known how many ranks are a ring
    config, reason_not = settle_packing(config)
    if reason_not is not None:
        logger.info("%s", reason_not)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _warn(config, facts, world_size)
    return ResolvedRecipe(config, model, facts)


def _warn(config: Config, facts: ModelFacts, world_size: int) -> None:
    for line in unused_keys(config, facts, world_size):
        logger.warning("%s", line)
    length, known = config.training.sequence_length, facts.context_tokens
    if (
        known is not None and length > known and config.data.packing != "rows"
    ):  # a packed row is longer than its samples
        logger.warning(
            "training.sequence_length %d: the language model knows %d positions (max_position_embeddings); longer "
            "samples train positions it has not seen, and generation refuses them", length, known,
        )  # fmt: skip
