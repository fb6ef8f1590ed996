"""LLaVA's projectors: identity, linear, mlpNx_gelu (N linear layers with exact GELU between; LLaVA-1.5: N = 2)."""

from functools import partial

from torch import nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.projectors.base import PROJECTORS

MAX_DEPTH = 8  # mlp1x_gelu to mlp8x_gelu are registered by name, so that a typing error finds its neighbour


@PROJECTORS.register("identity")
def identity(vision_size: int, language_size: int) -> nn.Module:
    """Features as they are. Raises ConfigError where the two sizes differ."""
    if vision_size != language_size:
        raise ConfigError(
            f"model.projector.type: found 'identity' with a tower of width {vision_size} and a language model of width "
            f"{language_size}, needs equal widths, or linear"
        )
    return nn.Identity()


@PROJECTORS.register("linear")
def linear(vision_size: int, language_size: int) -> nn.Module:
    """One linear layer."""
    return nn.Linear(vision_size, language_size)


def mlp_gelu(depth: int, vision_size: int, language_size: int) -> nn.Module:
    """`depth` linear layers, the first from the tower's width, GELU between them."""
    layers: list[nn.Module] = [nn.Linear(vision_size, language_size)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(language_size, language_size)]
    return nn.Sequential(*layers)


for _depth in range(1, MAX_DEPTH + 1):
    PROJECTORS.register(f"mlp{_depth}x_gelu")(partial(mlp_gelu, _depth))
