"""VILA's projectors that join neighbouring patches: squares of 2 x 2 or 3 x 3 become one row each.

* mlp_downsample          VILA 1.5 and NaVILA: 2 x 2, squares column by column
* mlp_downsample_2x2_fix  NVILA: the same layers, squares row by row
* mlp_downsample_3x3_fix  NVILA: 3 x 3 row by row, and a linear layer and a norm more

Hazard: VILA's later code gives `mlp_downsample` itself the order of `2x2_fix`. The name says nothing there: weights
must run with the order they were trained with, whatever their config calls them.

Kept for backward are the tower's features and the pre-activations: what lies between is computed again
(`recomputed_linear`).
"""

import math
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.projectors.base import PROJECTORS, OpsProjector
from megatron_vlm.ops.projector import bias_gelu, recomputed_linear, space_to_depth_norm
from megatron_vlm.ops.reference_projector import Blocks, Order


class DownsampleProjector(OpsProjector):
    """Space to depth, LayerNorm, a linear layer; then GELU, perhaps LayerNorm, and a linear layer, once or more.

    Args:
        factor: patches along a square's side.
        order: of the squares.
        widths: of the rows, from the square's to the language model's; a norm stands before every linear layer but the
            last.
    """

    def __init__(self, factor: int, order: Order, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.factor, self.order = factor, order
        layers: list[nn.Module] = [nn.Identity()]  # in the place of the published module that cuts the squares
        for index, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            is_last = index == len(widths) - 2
            layers += [nn.GELU()] if index else []
            layers += [] if is_last else [nn.LayerNorm(before)]
            layers.append(nn.Linear(before, after))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, side * side, c] -> rows [n, squares, h].

        Raises:
            ConfigError: the features are not of the grid of patches alone, or of a square one where none was given.
        """
        norm, linear = cast(nn.LayerNorm, self.layers[1]), cast(nn.Linear, self.layers[2])
        front = partial(_front, self._blocks(x.shape[1]), norm.eps, self.backend)
        rows = recomputed_linear(front, linear.weight, None, x, norm.weight, norm.bias)
        bias = linear.bias  # of the layer before, which the GELU adds
        norms: list[nn.LayerNorm] = []
        for layer in list(self.layers)[3:]:
            if isinstance(layer, nn.LayerNorm):
                norms = [layer]
            elif isinstance(layer, nn.Linear):
                is_last = layer is self.layers[-1]
                middle = partial(_middle, norms[0].eps if norms else 0.0, self.backend)
                parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
                rows = recomputed_linear(middle, layer.weight, layer.bias if is_last else None, rows, bias, *parameters)
                bias, norms = layer.bias, []
        return rows

    def _blocks(self, num_tokens: int) -> Blocks:
        side = math.isqrt(num_tokens)
        height, width = self.grid or (side, side)
        if height * width != num_tokens:
            needed = "a square number of them" if self.grid is None else f"{height} x {width}"
            raise ConfigError(
                f"model.projector.type: found one that joins {self.factor} x {self.factor} patches, with a tower of "
                f"{num_tokens} tokens an image, needs {needed}: the patches alone (model.vision.select_feature: patch)"
            )
        return Blocks(height, width, self.factor, self.order)


def _front(blocks: Blocks, eps: float, backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return space_to_depth_norm(x, blocks, weight, bias, eps, backend=backend)


def _middle(eps: float, backend: str, x: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    rows = bias_gelu(x, bias, backend=backend)
    return functional.layer_norm(rows, rows.shape[-1:], norm[0], norm[1], eps) if norm else rows


def _two(order: Order, vision_size: int, language_size: int) -> nn.Module:
    # 2x2: LN(4c), 4c -> h, GELU, h -> h
    return DownsampleProjector(2, order, (4 * vision_size, language_size, language_size))


PROJECTORS.register("mlp_downsample")(partial(_two, "column"))
PROJECTORS.register("mlp_downsample_2x2_fix")(partial(_two, "row"))


@PROJECTORS.register("mlp_downsample_3x3_fix")
def _three(vision_size: int, language_size: int) -> nn.Module:
    # LN(9c), 9c -> 3c, GELU, LN(3c), 3c -> h, GELU, h -> h
    return DownsampleProjector(3, "row", (9 * vision_size, 3 * vision_size, language_size, language_size))
