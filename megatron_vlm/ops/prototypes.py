"""SQ-LLaVA's prototype extractor: soft clusters of an image's tokens, each token told what its cluster holds.

* torch      matrix products and one softmax; the largest tensors are [n, p, t] and [n, t, c]
* reference  the published formulation, with two [n, p, t, c] products

There is no Triton kernel: each sum over an [n, p, t, c] product of the published form is a batched matrix product, of
the assignment [n, p, t] (one entry per token) with the features, and of its transpose with what was gathered. What is
left is matrix products, which cuBLAS does, a softmax over p, and passes over [n, p, t], p / c of the tokens' own size.
A gather by the nearest prototype would save more than half of that arithmetic, which is little, and its backward would
add in no fixed order; the matrix product is deterministic. For the same reason pooling is a product with a constant
matrix.

Hazard: prototypes grow alike, so that which one is nearest hangs on the last digits. Up to that choice the torch form
computes in a wider dtype than the features', half of them in fp32: in bf16 nearly every token of an image would take
another prototype. For fp32 it is fp64, as the gradients of the values are small sums of large terms, whose last digits
would be another on each processor (twice as far off as the published form's on some).

n images, t tokens, c the tower's width, p prototypes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vlm.ops import reference_projector
from megatron_vlm.ops.dispatch import AUTO, Operation
from megatron_vlm.ops.reference_projector import PrototypeWeights

PROTOTYPES: Operation[Callable[[Tensor, PrototypeWeights, int, int], Tensor]] = Operation("ops.projector (prototypes)")


def prototype_extract(
    x: Tensor,
    weights: PrototypeWeights,
    *,
    num_prototypes: int = 256,
    num_iterations: int = 2,
    backend: str = AUTO,
) -> Tensor:
    """Tokens plus what their nearest prototype gathered from its tokens (SQ-LLaVA, Sun et al. 2024).

        V, F = linear(x), linear(x);   C, G = averages of x and F over p stretches of tokens
        num_iterations times:  C = linear(C),  C = softmax over p of (C/|C| . V/|V|) F,  |V| over the tokens
        A = sigmoid(beta + alpha cos(C, x)) at each token's largest, else 0          [p, t]
        O = (A F + G) / (1 + tokens of the prototype);   y = x + A^T O

    As in the published weights' training, V is normalised over the tokens, and the gathered sums not by their weights.

    Args:
        x: [n, t, c]; t may be less than num_prototypes.
        weights: what is learned.
        backend: auto | torch | reference.

    Returns:
        [n, t, c]. The choice of the nearest prototype has no gradient.

    Raises:
        ConfigError: the backend asked for does not exist.
    """
    return PROTOTYPES.select(backend, x)(x, weights, num_prototypes, num_iterations)


def pooling_matrix(num_tokens: int, num_prototypes: int, like: Tensor) -> Tensor:
    """[p, t] of like's kind: what adaptive average pooling multiplies by. Stretch i is from floor(i t / p) up to
    ceil((i + 1) t / p), so stretches overlap where p does not divide t."""
    index = torch.arange(num_prototypes, device=like.device)[:, None]
    first, last = index * num_tokens // num_prototypes, -(-(index + 1) * num_tokens // num_prototypes)
    token = torch.arange(num_tokens, device=like.device)
    inside = (token >= first) & (token < last)
    return (inside / (last - first).double()).to(like.dtype)


@PROTOTYPES.backend("torch")
def _prototype_extract_torch(x: Tensor, weights: PrototypeWeights, num_prototypes: int, num_iterations: int) -> Tensor:
    features = functional.linear(x, *weights.features)
    pooling = pooling_matrix(x.shape[1], num_prototypes, x)
    center_features = pooling @ features  # [n, p, c]
    wide = torch.float64 if x.dtype in (torch.float32, torch.float64) else torch.float32
    tokens, alpha, beta = (tensor.to(wide) for tensor in (x, weights.alpha, weights.beta))
    values = functional.normalize(functional.linear(tokens, *_to(wide, weights.values)), dim=1)  # over the tokens
    centers = pooling.to(wide) @ tokens
    for _ in range(num_iterations):
        centers = functional.normalize(functional.linear(centers, *_to(wide, weights.centers)), dim=-1)
        centers = (centers @ values.mT).softmax(dim=1) @ features.to(wide)  # [n, p, t] @ [n, t, c]
    cosine = functional.normalize(centers, dim=-1) @ functional.normalize(tokens, dim=-1).mT
    nearest = (cosine * alpha.sign()).argmax(dim=1, keepdim=True)  # in the sigmoid's order, before it makes some equal
    similarity = torch.sigmoid(beta + alpha * cosine).to(x.dtype)  # [n, p, t]
    mask = torch.zeros_like(similarity).scatter_(1, nearest, 1.0)
    similarity = similarity * mask
    gathered = (similarity @ features + center_features) / (mask.sum(dim=2, keepdim=True) + 1.0)
    return torch.baddbmm(x, similarity.mT, gathered)


def _to(dtype: torch.dtype, linear: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    weight, bias = linear
    return weight.to(dtype), bias.to(dtype)


PROTOTYPES.backend("reference")(reference_projector.prototype_extract)
