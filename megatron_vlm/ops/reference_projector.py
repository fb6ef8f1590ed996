"""The plain-torch twins of the projector's operations (`ops.projector`, `ops.prototypes`): readable, obviously right.

n images, t tokens of an image, c the tower's width, k = factor^2 c, p prototypes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Order = Literal["row", "column"]
Gelu = Literal["exact", "tanh", "quick"]
QUICK_GELU_SLOPE = 1.702


@dataclass(frozen=True)
class Blocks:
    """The cut of an image's grid of patches into squares, each of which becomes one token.

    Args:
        side_h, side_w: of the grid, in patches; tokens come row by row.
        factor: patches along a square's side. Sides that it does not divide are padded by zeros, bottom and right.
        order: of the squares: `row` by row (NVILA) or `column` by column (VILA 1.5, NaVILA). Within a square the
            patches are always row by row.
    """

    side_h: int
    side_w: int
    factor: int
    order: Order

    @property
    def out_h(self) -> int:
        """Squares along the height."""
        return -(-self.side_h // self.factor)

    @property
    def out_w(self) -> int:
        """Squares along the width."""
        return -(-self.side_w // self.factor)

    @property
    def num_tokens(self) -> int:
        """Squares of an image."""
        return self.out_h * self.out_w


def space_to_depth(x: Tensor, blocks: Blocks) -> Tensor:
    """Patches [n, side_h * side_w, c] -> squares [n, out_h * out_w, factor^2 * c]."""
    grid = x.unflatten(1, (blocks.side_h, blocks.side_w))
    short_h = blocks.out_h * blocks.factor - blocks.side_h
    short_w = blocks.out_w * blocks.factor - blocks.side_w
    grid = functional.pad(grid, (0, 0, 0, short_w, 0, short_h))
    # [n, out_h * f, out_w * f, c] -> [n, out_h, f, out_w, f, c]
    grid = grid.unflatten(2, (blocks.out_w, blocks.factor)).unflatten(1, (blocks.out_h, blocks.factor))
    grid = grid.transpose(2, 3)  # -> [n, out_h, out_w, f, f, c]
    if blocks.order == "column":
        grid = grid.transpose(1, 2)
    return grid.flatten(3).flatten(1, 2)


def space_to_depth_norm(x: Tensor, blocks: Blocks, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of the squares; see `ops.projector.space_to_depth_norm`."""
    squares = space_to_depth(x, blocks)
    return functional.layer_norm(squares, weight.shape, weight, bias, eps)


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    """x Phi(x); its tanh approximation; or x sigmoid(1.702 x) (Hendrycks and Gimpel 2016)."""
    if kind == "quick":
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return functional.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def bias_gelu(x: Tensor, bias: Tensor, kind: Gelu) -> Tensor:
    """gelu(x + bias), in fp32 at least up to its end; see `ops.projector.bias_gelu`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return gelu(x.to(wide) + bias.to(wide), kind).to(x.dtype)


def linear_rows_into(buffer: Tensor, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The buffer with row rows[i] replaced by x[i] weight^T + bias; see `ops.projector.linear_rows_into`."""
    return buffer.index_copy(0, rows, functional.linear(x, weight, bias))


@dataclass(frozen=True)
class PrototypeWeights:
    """Parameters of the prototype extractor, c the tower's width.

    Args:
        centers, values, features: (weight [c, c], bias [c]) of three linear layers.
        alpha, beta: one number each, scale and shift of a token's similarity to its prototype.
    """

    centers: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    features: tuple[Tensor, Tensor]
    alpha: Tensor
    beta: Tensor


def prototype_extract(x: Tensor, weights: PrototypeWeights, num_prototypes: int, num_iterations: int) -> Tensor:
    """The published form, one [n, p, t, c] product for each of the two sums; see `ops.prototypes.prototype_extract`."""
    values = functional.linear(x, *weights.values).transpose(1, 2)  # [n, t, c] -> [n, c, t]
    features = functional.linear(x, *weights.features)
    centers, center_features = (
        functional.adaptive_avg_pool1d(rows.transpose(1, 2), num_prototypes).transpose(1, 2) for rows in (x, features)
    )  # [n, p, c]
    for _ in range(num_iterations):
        centers = functional.linear(centers, *weights.centers)
        # The values are normalised over the tokens, not over the width: so it was trained.
        scores = functional.normalize(centers, dim=-1) @ functional.normalize(values, dim=-1)
        centers = scores.softmax(dim=1) @ features  # over the prototypes
    cosine = functional.normalize(centers, dim=-1) @ functional.normalize(x, dim=-1).transpose(1, 2)
    similarity = torch.sigmoid(weights.beta + weights.alpha * cosine)  # [n, p, t]
    nearest = similarity.argmax(dim=1, keepdim=True)
    mask = torch.zeros_like(similarity).scatter(1, nearest, 1.0)
    similarity = similarity * mask
    gathered = (similarity.unsqueeze(-1) * features.unsqueeze(1)).sum(dim=2) + center_features  # over tokens
    gathered = gathered / (mask.sum(dim=2, keepdim=True) + 1.0)
    return x + (similarity.unsqueeze(-1) * gathered.unsqueeze(2)).sum(dim=1)  # over prototypes
