"""Facts of a recipe's model for validation, found without weights, ranks or process groups (DESIGN D12).

Tower and projector are built on the meta device. The language model's parameter names are those of its table
(`parameters`) instead: a GPTModel cannot be built before the process groups exist. A test compares them with a real
model's.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from megatron_vlm.config.packages import installed_packages
from megatron_vlm.config.rules import ModelFacts, names_its_model
from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import context_tokens, example_tensors, parameter_table
from megatron_vlm.models.description import ModelDescription, describe_model
from megatron_vlm.models.families import FAMILIES
from megatron_vlm.models.projectors import PROJECTORS, build_projector
from megatron_vlm.models.projectors.base import backend_obstacle
from megatron_vlm.models.vision.survey import TowerSurvey
from megatron_vlm.ops.table import obstacles


def gather_facts(
    config: Config,
    templates: Iterable[str],
    tasks: Iterable[str],
    device: torch.device | None = None,
    model: ModelDescription | None = None,
) -> ModelFacts:
    """The facts of a recipe's model.

    Args:
        config: the recipe, which `names_its_model`.
        templates: names of the conversation templates, which the data layer knows.
        tasks: names of the evaluation tasks, which the evaluation layer knows.
        device: what the ranks compute on; None where it is not this machine that they run on.
        model: its description, where there is one already.

    Raises:
        ConfigError: where tower or language model cannot be read, so that nothing more can be said about them.
    """
    assert names_its_model(config.model)
    model = model or describe_model(config.model, is_validated=False)
    language, survey = model.language, model.survey
    projector = _projector(config.model.projector.type, survey, language.hidden_size)
    return ModelFacts(
        num_layers=language.num_hidden_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        ffn_hidden_size=language.intermediate_size,
        vocab_size=language.vocab_size,
        vision_num_layers=survey.num_layers,
        tokens_per_image=survey.media_spec.tokens_per_image,
        parameter_names={
            "language": language_parameter_names(language),
            "vision": tuple(f"vision.{name}" for name in survey.parameter_names if name not in survey.unreached),
            "projector": tuple(f"projector.{name}" for name, _ in projector.named_parameters()),
        },
        families=tuple(FAMILIES.names()),
        projectors=tuple(PROJECTORS.names()),
        templates=tuple(templates),
        tasks=tuple(tasks),
        installed=installed_packages(),
        context_tokens=context_tokens(language),
        backend_obstacles=tuple(_backend_obstacles(config, language, projector, device)),
    )


def language_parameter_names(language: PretrainedConfig) -> tuple[str, ...]:
    """Global parameter names of a whole language model, in forward order."""
    return parameter_table(language).names()


def _projector(name: str, survey: TowerSurvey, language_size: int) -> nn.Module:
    """Builds the projector on the meta device; an unknown name gives one that does nothing: validation reports it with
    other faults."""
    if name not in PROJECTORS:
        return nn.Identity()
    with torch.device("meta"):
        return build_projector(name, survey.hidden_size, language_size)


def _backend_obstacles(
    config: Config, language: PretrainedConfig, projector: nn.Module, device: torch.device | None
) -> Iterator[str]:
    """Reasons why backends that the recipe names, and uses, cannot run."""
    requested, name = config.used_ops(), config.model.projector.type
    if name in PROJECTORS and (reason := backend_obstacle(projector, name, config.ops.projector)):
        del requested["projector"]
        yield reason
    if device is not None:
        yield from obstacles(requested, example_tensors(language, config, device))
