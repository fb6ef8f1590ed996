"""The table of projectors: how a tower's features become rows of the language model's width.

A projector is built from (vision width, language width) and maps [..., vision] -> [..., language]. Its module names are
LLaVA's own (`0.weight`, `2.weight`), so that weights move by name.
"""

from collections.abc import Callable

from torch import nn

from megatron_vlm.registry import Registry

ProjectorBuilder = Callable[[int, int], nn.Module]
PROJECTORS: Registry[ProjectorBuilder] = Registry("projector")


def build_projector(name: str, vision_size: int, language_size: int) -> nn.Module:
    """The projector of that name, mapping [..., vision_size] -> [..., language_size], random weights.

    Raises ConfigError for an unknown name, or where the projector cannot join the two sizes.
    """
    return PROJECTORS.get(name)(vision_size, language_size)
