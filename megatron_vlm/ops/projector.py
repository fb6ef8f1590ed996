"""The projector's operations: space to depth with LayerNorm, bias with GELU, and a linear layer into given rows.

* triton     one kernel each (`megatron_vlm_kernels`): no padded or permuted copy, no pre-activation kept twice, no
             product stored before it is moved to its rows
* torch      torch's own kernels
* reference  the plain twins, `reference_projector`

`recomputed_linear` keeps nothing between an operation and the linear layer behind it. `linear_rows_into` is called by
no model: rows are moved by the exchange (docs/decisions/0008).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vlm.ops import reference_projector
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection, triton_obstacle
from megatron_vlm.ops.reference_projector import Blocks, Gelu

SPACE_TO_DEPTH: Operation[Callable[[Tensor, Blocks, Tensor, Tensor, float], Tensor]] = Operation(
    "ops.projector (space to depth)"
)
BIAS_GELU: Operation[Callable[[Tensor, Tensor, Gelu], Tensor]] = Operation("ops.projector (bias and GELU)")
LINEAR_ROWS: Operation[Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]] = Operation(
    "ops.projector (linear into rows)"
)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def space_to_depth_norm(
    x: Tensor, blocks: Blocks, weight: Tensor, bias: Tensor, eps: float, *, backend: str = AUTO
) -> Tensor:
    """LayerNorm over squares of neighbouring patches, each square one token (VILA's downsample blocks).

    Args:
        x: [n, side_h * side_w, c]; any strides with channels side by side.
        blocks: the grid, the square and the order of the squares; zeros fill up a square at the grid's edge, and take
            part in the mean.
        weight, bias: [k], k = factor^2 * c: the patches of a square row by row, each with its channels.
        backend: auto | triton | torch | reference.

    Returns:
        [n, blocks.num_tokens, k] in x's dtype.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    width = blocks.factor**2 * x.shape[2]
    assert x.shape[1] == blocks.side_h * blocks.side_w, f"{x.shape[1]} patches, {blocks.side_h} x {blocks.side_w}"
    assert weight.shape == bias.shape == (width,), f"weight {tuple(weight.shape)}, {width} numbers in a square"
    return SPACE_TO_DEPTH.select(backend, x, weight, blocks.factor)(x, blocks, weight, bias, eps)


def bias_gelu(x: Tensor, bias: Tensor, kind: Gelu = "exact", *, backend: str = AUTO) -> Tensor:
    """gelu(x + bias): `exact` by erf, by `tanh`, or `quick`, z sigmoid(1.702 z) (Hendrycks and Gimpel 2016).

    Args:
        x: [..., h]. bias: [h].
        backend: auto | triton | torch | reference. triton keeps x alone for backward, and adds the bias in fp32.

    Raises:
        ConfigError: as `space_to_depth_norm`.
    """
    return BIAS_GELU.select(backend, x, bias)(x, bias, kind)


def linear_rows_into(
    buffer: Tensor, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = AUTO
) -> Tensor:
    """A linear layer whose i-th output row takes the place of row rows[i] of the buffer.

    Args:
        buffer: [s, o], contiguous, of x's dtype. It is given up: what is returned may be the same memory.
        rows: [m] int64, all different, 0 <= row < s; not checked on a GPU.
        x: [m, i]. weight: [o, i]. bias: [o] or None.
        backend: auto | triton | torch | reference.

    Returns:
        [s, o]. The buffer's gradient is zero at the rows written.

    Raises:
        ConfigError: as `space_to_depth_norm`.
    """
    assert rows.dtype == torch.int64 and rows.shape == x.shape[:1], f"rows {rows.dtype} {rows.shape}, x {x.shape}"
    assert buffer.dim() == x.dim() == 2 and buffer.shape[1] == weight.shape[0], f"buffer {buffer.shape}, x {x.shape}"
    assert buffer.is_contiguous() and buffer.dtype == x.dtype, f"buffer {buffer.dtype} {buffer.stride()}, x {x.dtype}"
    return LINEAR_ROWS.select(backend, x, weight, buffer)(buffer, rows, x, weight, bias)


def recomputed_linear(function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
    """linear(function(*inputs), weight, bias) that keeps the inputs alone: backward calls the function again.

    For a function that costs little beside the layer and gives a large result: a projector then keeps its input and its
    pre-activations, nothing between.

    Args:
        function: of tensors, deterministic; [..., i] -> as functional.linear takes it.
        weight: [o, i]. bias: [o] or None.
    """
    out: Tensor = _RecomputedLinear.apply(function, weight, bias, *inputs)
    return out


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(weight, *inputs)
        return functional.linear(function(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, wants_weight, wants_bias, *wanted = ctx.needs_input_grad
        rows = grad_out.flatten(0, -2)  # [..., o] -> [t, o]
        grad_bias = rows.sum(0) if wants_bias else None
        if not (wants_weight or any(wanted)):
            return None, None, grad_bias, *(None for _ in inputs)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(wants) for x, wants in zip(inputs, wanted, strict=True)]
            middle = ctx.function(*inputs)
        grad_weight = rows.T @ middle.detach().flatten(0, -2) if wants_weight else None
        if not any(wanted):
            return None, grad_weight, grad_bias, *(None for _ in inputs)
        gradients = torch.autograd.grad(middle, [x for x in inputs if x.requires_grad], grad_out @ weight)
        found = iter(gradients)
        return None, grad_weight, grad_bias, *(next(found) if wants else None for wants in wanted)


def _obstacle(*tensors: Tensor) -> str | None:
    reason = triton_obstacle(*tensors)
    if reason is not None:
        return reason
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= set(TRITON_DTYPES):
        found = " and ".join(sorted(map(str, dtypes)))
        return f"it computes in fp32 and needs one dtype of {', '.join(map(str, TRITON_DTYPES))}, found {found}"
    return None


def _space_to_depth_obstacle(x: Tensor, weight: Tensor, factor: int) -> str | None:
    reason = _obstacle(x, weight)
    if reason is not None:
        return reason
    from megatron_vlm_kernels.limits import MAX_SQUARE_NUMBERS, square_numbers

    if square_numbers(x.shape[2], factor) > MAX_SQUARE_NUMBERS:
        return f"a square of {factor} x {factor} patches of {x.shape[2]:,} channels is too large for it"
    return None


@SPACE_TO_DEPTH.backend(TRITON, _space_to_depth_obstacle, interpreter_objection)
def _space_to_depth_triton(x: Tensor, blocks: Blocks, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from megatron_vlm_kernels.space_to_depth import SpaceToDepthNorm

    sides = (blocks.side_h, blocks.side_w)
    out: Tensor = SpaceToDepthNorm.apply(x, sides, blocks.factor, blocks.order == "row", weight, bias, eps)
    return out


# The twin has no fewer passes to offer than torch: a permuted copy and torch's LayerNorm.
SPACE_TO_DEPTH.backend("torch")(reference_projector.space_to_depth_norm)
SPACE_TO_DEPTH.backend("reference")(reference_projector.space_to_depth_norm)


@BIAS_GELU.backend(TRITON, _obstacle, interpreter_objection)
def _bias_gelu_triton(x: Tensor, bias: Tensor, kind: Gelu) -> Tensor:
    from megatron_vlm_kernels.bias_gelu import BiasGelu

    out: Tensor = BiasGelu.apply(x, bias, kind)
    return out


BIAS_GELU.backend("torch")(reference_projector.bias_gelu)
BIAS_GELU.backend("reference")(reference_projector.bias_gelu)


@LINEAR_ROWS.backend(TRITON, _obstacle, interpreter_objection)
def _linear_rows_triton(buffer: Tensor, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from megatron_vlm_kernels.linear_rows import LinearRowsInto

    out: Tensor = LinearRowsInto.apply(buffer, rows, x, weight, bias)
    return out


@LINEAR_ROWS.backend("torch")
def _linear_rows_torch(buffer: Tensor, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return buffer.index_copy_(0, rows, functional.linear(x, weight, bias))


LINEAR_ROWS.backend("reference")(reference_projector.linear_rows_into)
