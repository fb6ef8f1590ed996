"""LLaVA's projectors: identity, linear, mlpNx_gelu (N linear layers with exact GELU between; LLaVA-1.5: N = 2).

Of an MLP the features and the pre-activations are kept for backward; a layer's bias is added with the GELU behind it.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.projectors.base import PROJECTORS, OpsProjector
from megatron_vlm.ops.projector import bias_gelu, recomputed_linear

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
    return MlpProjector(*layers) if depth > 1 else nn.Sequential(*layers)


class MlpProjector(OpsProjector, nn.Sequential):
    """Linear layers at 0, 2, 4, ..., LLaVA's names; what stands between them is one operation with the bias before."""

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., c] -> rows [..., h]."""
        first, *others = (layer for layer in self if isinstance(layer, nn.Linear))
        act = partial(bias_gelu, backend=self.backend)
        rows, bias = functional.linear(x, first.weight), first.bias
        for layer in others:
            is_last = layer is others[-1]
            rows = recomputed_linear(act, layer.weight, layer.bias if is_last else None, rows, bias)
            bias = layer.bias
        return rows


for _depth in range(1, MAX_DEPTH + 1):
    PROJECTORS.register(f"mlp{_depth}x_gelu")(partial(mlp_gelu, _depth))
