"""The whole model's table: which of our tensors is made of which Hugging Face tensors, for every part.

Language model as in `mappings`; tower and projector are replicated, so each tensor is one of theirs under another name.
Their names and shapes come from the modules themselves, built on the meta device.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_vlm.conversion.mappings import language_mappings, projector_name, tower_name
from megatron_vlm.models.cuts import Mapping, Replicated
from megatron_vlm.models.projectors import build_projector
from megatron_vlm.models.vision.survey import build_hf_tower


def model_mappings(language: PretrainedConfig, vision: PretrainedConfig, projector: str) -> list[Mapping]:
    """The table of a model of these parts; names are the keys of a checkpoint.

    Args:
        projector: a registered type.

    Raises:
        ConfigError: a part that cannot be built.
    """
    with torch.device("meta"):
        tower = build_hf_tower(vision)
        joint = build_projector(projector, vision.hidden_size, language.hidden_size)
    table = language_mappings(language)
    table += [_whole(f"vision.{name}", tower_name(name), tensor) for name, tensor in tower.state_dict().items()]
    table += [_whole(f"projector.{name}", projector_name(name), tensor) for name, tensor in joint.state_dict().items()]
    return table


def _whole(name: str, source: str, tensor: Tensor) -> Mapping:
    return Replicated(name, (source,), (tuple(tensor.shape),))
