"""A linear layer whose output rows go straight to their places in a buffer: no product is stored, and none is copied.

    buffer[rows[i]] = x[i] W^T + b
    with g = the buffer's gradient:  dx = g[rows] W,  dW = g[rows]^T x,  db = sum over i of g[rows[i]],
    dbuffer = g with the rows written set to zero

Forward is one GEMM with fp32 accumulation, whose epilogue looks each row's place up; backward gathers the rows once and
leaves both GEMMs to torch. Programs are ordered in groups of row tiles, so that tiles of W stay in the cache.

Hazards: the buffer is written in place. Places must differ from each other and lie in the buffer; they are not checked,
which would make the host wait. bf16 products are wrong under Triton's interpreter, so there (WIDEN) they are fp32's.

m rows, i inputs, o outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vlm_kernels import is_interpreted
from megatron_vlm_kernels.outputs import stored_dtype

GROUP_TILES = 8


@triton.jit
def _kernel(
    buffer_ptr,
    rows_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the product, written to its rows' places."""
    row_tiles, output_tiles = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_outputs, BLOCK_OUTPUTS)
    group = tl.program_id(0) // (GROUP * output_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * output_tiles)
    rows = (group * GROUP + within % group_rows).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = (within // group_rows).to(tl.int64) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row_inside, output_inside = rows < num_rows, outputs < num_outputs
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], dtype=tl.float32)
    for start in range(0, num_inputs, BLOCK_INPUTS):
        inputs = start + tl.arange(0, BLOCK_INPUTS)
        input_inside = inputs < num_inputs
        x = tl.load(
            x_ptr + rows[:, None] * num_inputs + inputs[None, :],
            mask=row_inside[:, None] & input_inside[None, :],
            other=0.0,
        )
        weight = tl.load(  # W^T: [BLOCK_INPUTS, BLOCK_OUTPUTS]
            weight_ptr + outputs[None, :] * num_inputs + inputs[:, None],
            mask=input_inside[:, None] & output_inside[None, :],
            other=0.0,
        )
        if WIDEN:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=output_inside, other=0.0).to(tl.float32)[None, :]
    places = tl.load(rows_ptr + rows, mask=row_inside, other=0).to(tl.int64)
    tl.store(
        buffer_ptr + places[:, None] * num_outputs + outputs[None, :],
        total.to(buffer_ptr.dtype.element_ty),
        mask=row_inside[:, None] & output_inside[None, :],
    )


def _plan(num_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles and warps: large ones for 16-bit numbers and many rows, which the tensor cores are fed with from shared
    memory; small ones for fp32, and under the interpreter, where a padded tile costs time."""
    if is_interpreted():
        return {"BLOCK_ROWS": 16, "BLOCK_OUTPUTS": 32, "BLOCK_INPUTS": 32, "num_warps": 4, "num_stages": 2}
    if dtype is torch.float32:
        return {"BLOCK_ROWS": 64, "BLOCK_OUTPUTS": 64, "BLOCK_INPUTS": 32, "num_warps": 4, "num_stages": 3}
    if num_rows <= 64:
        return {"BLOCK_ROWS": 64, "BLOCK_OUTPUTS": 128, "BLOCK_INPUTS": 64, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_ROWS": 128, "BLOCK_OUTPUTS": 256, "BLOCK_INPUTS": 64, "num_warps": 8, "num_stages": 3}


def write_rows(buffer: Tensor, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """buffer [s, o], rows [m] int64, x [m, i], weight [o, i], bias [o]; all contiguous. Writes into the buffer."""
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    if not num_rows:
        return
    plan = _plan(num_rows, x.dtype)
    target = buffer.to(stored_dtype(buffer.dtype))
    num_tiles = triton.cdiv(num_rows, plan["BLOCK_ROWS"]) * triton.cdiv(num_outputs, plan["BLOCK_OUTPUTS"])
    _kernel[(num_tiles,)](
        target, rows, x, weight, weight if bias is None else bias, num_rows, num_outputs, num_inputs,
        HAS_BIAS=bias is not None, WIDEN=is_interpreted(), GROUP=GROUP_TILES, **plan,
    )  # fmt: skip
    if target is not buffer:
        buffer.copy_(target)


class LinearRowsInto(torch.autograd.Function):
    """(buffer [s, o], rows [m], x [m, i], weight [o, i], bias [o] or None) -> the buffer, written in place."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, rows = x.contiguous(), rows.contiguous()
        write_rows(buffer, rows, x, weight.contiguous(), None if bias is None else bias.contiguous())
        ctx.mark_dirty(buffer)
        ctx.save_for_backward(rows, x, weight)
        return buffer

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, x, weight = ctx.saved_tensors
        wants_buffer, _, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        written = grad_out.index_select(0, rows)  # [s, o] -> [m, o]
        grad_buffer = grad_out.index_fill(0, rows, 0.0) if wants_buffer else None
        grad_x = written @ weight if wants_x else None
        grad_weight = written.T @ x if wants_weight else None
        grad_bias = written.sum(0) if wants_bias else None
        return grad_buffer, None, grad_x, grad_weight, grad_bias
