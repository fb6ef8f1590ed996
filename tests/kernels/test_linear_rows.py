"""The GEMM that writes its rows to their places, against its twin."""

import pytest
import torch

from megatron_vlm.ops.projector import linear_rows_into
from tests.kernels.accuracy import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(9, 4, 8, 16), (40, 33, 70, 45), (20, 20, 16, 32), (300, 150, 33, 40), (5, 1, 1, 1)]  # buffer rows, m, i, o


def draw(shape, seed=0):
    """Rows; buffer, x, weight, bias and the output's gradient, fp64."""
    num_places, num_rows, num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_places, generator=generator)[:num_rows]
    sizes = ((num_places, num_outputs), (num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,))
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (*sizes, sizes[0])]
    return rows, drawn


def results(rows, drawn, dtype, device, backend):
    *inputs, grad = (t.to(dtype).to(device, copy=True) for t in drawn)
    for tensor in inputs:
        tensor.requires_grad_()
    buffer, x, weight, bias = inputs
    out = linear_rows_into(buffer.clone(), rows.to(device), x, weight, bias, backend=backend)
    names = ("grad_buffer", "grad_x", "grad_weight", "grad_bias")
    return {"out": out} | dict(zip(names, torch.autograd.grad(out, inputs, grad), strict=True))


def compare(shape, dtype, device, backend="triton", told=None):
    """`told`: makes of the rows what the kernel is told instead."""
    rows, drawn = draw(shape)
    drawn = [t.to(dtype).double() for t in drawn]
    assert_as_exact(
        results(told(rows) if told else rows, drawn, dtype, device, backend),
        results(rows, drawn, dtype, device, "reference"),
        results(rows, drawn, torch.float64, device, "reference"),
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype, backend, device):
    compare(shape, dtype, device, backend)


def test_two_rows_swapped_are_found(device):
    def swap(rows):
        return rows[[1, 0, *range(2, len(rows))]]

    with pytest.raises(AssertionError, match="out: error"):
        compare(SHAPES[1], torch.float32, device, told=swap)


def test_a_buffer_that_keeps_its_gradient_is_found(device, monkeypatch):
    from megatron_vlm_kernels.linear_rows import LinearRowsInto

    right = LinearRowsInto.backward
    monkeypatch.setattr(LinearRowsInto, "backward", lambda ctx, grad: (grad, *right(ctx, grad)[1:]))
    with pytest.raises(AssertionError, match="grad_buffer: error"):
        compare(SHAPES[1], torch.float32, device)


def test_other_rows_stay_to_the_bit_and_the_buffer_is_used(device):
    rows, (buffer, x, weight, bias, _) = draw(SHAPES[1])
    buffer, x, weight, bias = (t.bfloat16().to(device) for t in (buffer, x, weight, bias))
    rows = rows.to(device)
    before = buffer.clone()
    out = linear_rows_into(buffer, rows, x, weight, bias, backend="triton")
    others = torch.ones(len(buffer), dtype=torch.bool, device=device).index_fill(0, rows, False)
    assert out.data_ptr() == buffer.data_ptr() and torch.equal(out[others], before[others])
    assert not torch.equal(out[rows], before[rows])


def test_without_bias_without_rows_and_what_trains(device):
    rows, (buffer, x, weight, _, grad) = draw(SHAPES[0])
    buffer, x, weight, grad = (t.float().to(device) for t in (buffer, x, weight, grad))
    rows = rows.to(device)
    out = linear_rows_into(buffer.clone(), rows, x.requires_grad_(), weight, None, backend="triton")
    twin = linear_rows_into(buffer.clone(), rows, x, weight, None, backend="reference")
    torch.testing.assert_close(out, twin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(twin, x, grad))
    none = linear_rows_into(buffer.clone(), rows[:0], x[:0], weight, None, backend="triton")
    assert torch.equal(none, buffer)


def test_a_buffer_used_after_it_was_given_up_is_loud(device):
    rows, (buffer, x, weight, bias, _) = draw(SHAPES[0])
    buffer, x, weight, bias = (t.float().to(device).requires_grad_() for t in (buffer, x, weight, bias))
    buffer = buffer * 1
    squares = buffer.square()  # backward needs the buffer as it was
    out = linear_rows_into(buffer, rows.to(device), x, weight, bias, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares.sum() + out.sum()).backward()
