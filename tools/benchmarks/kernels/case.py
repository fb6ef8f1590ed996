"""A `Case`: one operation as the kernel benchmark measures it.

A case says how to draw inputs of a size, how the product's door is called with a backend, what the plain twin is, which
other packages do the same, and the least that each pass must move and compute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.ops.dispatch import Operation

OURS = "ours"  # the product's side, where an operation has no backends
Sizes = Mapping[str, int]
Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Forward = Callable[[Tensors], Outputs]
Backward = Callable[[Tensors, Outputs, Outputs], Outputs]  # inputs, outputs, their gradients -> gradients


@dataclass(frozen=True)
class Work:
    """The least that a pass must do: every input read once, every output written once, and the products."""

    num_bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Draw:
    """Makes inputs of one kind on one device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed, rounded to the dtype."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (drawn * scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """0 .. high - 1, int64."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One operation of the benchmark.

    Args:
        op: its name.
        operation: whose backends are sides; None where it has none.
        call: inputs and a backend's name -> outputs, through the product's door.
        reference: the plain twin, which torch.compile is given, and which in fp64 is exact.
        trained: the inputs that want gradients; none where `backward` gives them without autograd.
        draw: inputs by name.
        work: sizes and bytes of an element -> what the forward and the backward pass must do.
        sizes: of real models; `tiny` for the CPU and Triton's interpreter; `exact`: at which errors are measured.
        backward: a backend's own; default: autograd. `reference_backward`: the twin's.
        accumulate: inputs, autograd's gradients and a side's name -> gradients: puts some where training wants them,
            into memory that `draw` gives; default: they stay as they are.
        others: further sides by name; a side whose package is not there raises ImportError.
        compiles: whether torch.compile takes part, on the plain twin.
        tolerance: the error its sides may have, as a share of the tensor's norm, where they compute in a narrower
            format than their inputs' dtype; default: twice plain torch's error.
    """

    op: str
    operation: Operation[Any] | None
    call: Callable[[Tensors, str], Outputs]
    reference: Forward
    trained: tuple[str, ...]
    draw: Callable[[Sizes, Draw], Tensors]
    work: Callable[[Sizes, int], tuple[Work, Work]]
    sizes: tuple[Sizes, ...]
    tiny: tuple[Sizes, ...]
    exact: Sizes
    backward: Callable[[str], Backward] | None = None
    reference_backward: Backward | None = None
    accumulate: Callable[[Tensors, Outputs, str], Outputs] = lambda inputs, gradients, side: gradients
    others: Mapping[str, Forward] = field(default_factory=dict)
    compiles: bool = True
    tolerance: float | None = None


def no_gradients(inputs: Tensors, outputs: Outputs, gradients: Outputs) -> Outputs:
    """The backward pass of what has none."""
    return ()
