"""A model's description in the shape that a test needs."""

from dataclasses import replace

from megatron_vlm.config.schema import Config
from megatron_vlm.models.description import ModelDescription, describe_model
from megatron_vlm.models.vision.media_spec import MediaSpec


def described(config: Config, spec: MediaSpec) -> ModelDescription:
    """The recipe's model, with other pixels and tokens per image than its tower's."""
    model = describe_model(config.model)
    return replace(model, survey=replace(model.survey, media_spec=spec))
