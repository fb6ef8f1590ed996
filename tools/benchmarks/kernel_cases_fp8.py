"""What the kernel benchmark measures of FP8: the linear layers of an 8B model (hidden 4096, feed-forward 14336) over
8192 tokens, quantisation included, against the same in bf16; and the quantising alone, which only moves bytes.

FLOPs are of the products, forward and backward apart; bytes the least that quantising must move: the input read twice
(its largest number must be known before the first is divided by it), both copies written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vlm.ops.fp8 import E4M3, E5M2, Fp8Matrix, fp8_linear, quantise

Inputs = dict[str, Tensor]
Shape = tuple[int, int, int]  # tokens, inputs, outputs

TOKENS = 8192
LAYERS: dict[str, Shape] = {  # of an 8B model with 32 query heads and 8 kv heads of width 128
    "qkv": (TOKENS, 4096, 6144),
    "proj": (TOKENS, 4096, 4096),
    "fc1": (TOKENS, 4096, 2 * 14336),
    "fc2": (TOKENS, 14336, 4096),
}
TINY: Shape = (24, 32, 48)  # for the CPU


@dataclass(frozen=True)
class Fp8Case:
    """One operation.

    Args:
        name: for the table.
        backends: side -> inputs to outputs; differentiable where `backward_flops` says so.
        make_inputs: shape, device, dtype -> inputs by name; those that train want gradients.
        flops: shape -> of the forward pass; backward_flops: of the backward pass, 0 where there is none.
        num_bytes: shape and bytes of an element -> the least that is moved.
        shapes: of a real model, by name.
    """

    name: str
    backends: dict[str, Callable[[Inputs], tuple[Tensor, ...]]]
    make_inputs: Callable[[Shape, torch.device, torch.dtype], Inputs]
    flops: Callable[[Shape], int]
    backward_flops: Callable[[Shape], int]
    num_bytes: Callable[[Shape, int], int]
    shapes: dict[str, Shape]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """x [t, k] and weight [n, k], both training, and dy [t, n]."""
    tokens, inputs, outputs = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    return {
        "x": normal(tokens, inputs).requires_grad_(),
        "weight": normal(outputs, inputs, scale=inputs**-0.5).requires_grad_(),
        "dy": normal(tokens, outputs),
    }


def _copies(matrix: Fp8Matrix) -> tuple[Tensor, ...]:
    assert matrix.rows is not None and matrix.columns is not None
    return matrix.rows, matrix.columns, matrix.scale


def _products(shape: Shape) -> int:
    tokens, inputs, outputs = shape
    return 2 * tokens * inputs * outputs


def _linear_bytes(shape: Shape, element: int) -> int:
    """Forward: x and weight read, the result written. What FP8 copies cost on top is its own affair."""
    tokens, inputs, outputs = shape
    return (tokens * inputs + outputs * inputs + tokens * outputs) * element


LINEAR = Fp8Case(
    name="fp8_linear",
    backends={
        "bf16": lambda x: (functional.linear(x["x"], x["weight"]),),
        "fp8 e4m3": lambda x: (fp8_linear(x["x"], x["weight"]),),
        "fp8 e4m3, gradients e5m2": lambda x: (fp8_linear(x["x"], x["weight"], gradient_format=E5M2),),
        "fp8 e4m3, quantised by torch": lambda x: (fp8_linear(x["x"], x["weight"], backend="reference"),),
    },
    make_inputs=make_inputs,
    flops=_products,
    backward_flops=lambda shape: 2 * _products(shape),
    num_bytes=_linear_bytes,
    shapes=LAYERS,
)
QUANTISE = Fp8Case(
    name="fp8_quantise",
    backends={
        backend: lambda x, backend=backend: _copies(quantise(x["x"], E4M3, backend=backend))  # type: ignore[misc]
        for backend in ("triton", "reference")
    },
    make_inputs=make_inputs,
    flops=lambda shape: 0,
    backward_flops=lambda shape: 0,
    num_bytes=lambda shape, element: shape[0] * shape[1] * (2 * element + 2),
    shapes={name: LAYERS[name] for name in ("proj", "fc2")},
)
CASES = [LINEAR, QUANTISE]
