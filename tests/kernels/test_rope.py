"""The RoPE kernel against its twin: positions that restart, strides, tables that repeat, the gradient in place."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import reference
from megatron_vlm.ops.rope import apply_rope, rope_tables
from tests.kernels.accuracy import assert_as_exact

SHAPES = [(1, 1, 1, 2), (2, 5, 3, 10), (2, 7, 4, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(shape, seed=0):
    """x and its output's gradient, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def tables(shape, device):
    """Of rows of two packed documents, each beginning at 0; the second row is far on."""
    b, s, _, d = shape
    positions = torch.arange(s).repeat(b, 1)
    positions[:, s // 2 :] -= s // 2
    positions[1:] += 1000
    frequencies = 1.0 / (10_000 ** (torch.arange(0, d, 2) / d))
    return rope_tables(positions.to(device), frequencies.to(device))


def results(function, drawn, dtype, device):
    x, grad_out = (t.to(dtype).to(device, copy=True) for t in drawn)
    out = function(x.requires_grad_(), *tables(x.shape, device))
    return {"out": out, "grad_x": torch.autograd.grad(out, x, grad_out)[0]}


def triton(x, cos, sin):
    return apply_rope(x, cos, sin, backend="triton")


def compare(drawn, dtype, device, function=triton):
    rounded = [t.to(dtype).double() for t in drawn]
    assert_as_exact(
        results(function, rounded, dtype, device),
        results(reference.apply_rope, rounded, dtype, device),
        results(reference.apply_rope, rounded, torch.float64, device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_torch(shape, dtype, device):
    compare(draw(shape), dtype, device)


def test_fp16(device):
    compare(draw((2, 5, 3, 10)), torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 70, 64), (2, 9, 4, 128)])
def test_several_tiles(shape, dtype, device, tiles_of_a_gpu):
    """Of heads, and of tokens."""
    compare(draw(shape), dtype, device)


def test_the_papers_order_of_pairs_is_found(device):
    def interleaved(x, cos, sin):
        pairs = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
        return apply_rope(pairs, cos, sin, backend="triton")

    with pytest.raises(AssertionError, match="out: error"):
        compare(draw((2, 5, 3, 10)), torch.float32, device, interleaved)


def test_a_gradient_turned_onwards_is_found(device, monkeypatch):
    """The backward pass by the same angle instead of the opposite one."""
    from megatron_vlm_kernels import rope as kernels

    right = kernels.rotate
    monkeypatch.setattr(kernels, "rotate", lambda x, cos, sin, **_: right(x, cos, sin))
    with pytest.raises(AssertionError, match="grad_x: error"):
        compare(draw((2, 5, 3, 10)), torch.float32, device)


def test_heads_are_read_where_they_lie(device):
    """A slice of a projection's [s, b, heads, d], as ContextAttention hands it over; the gradient likewise."""
    shape = (2, 5, 3, 12)
    fused = draw((5, 2, 6, 12))[0].float().to(device)
    x = fused[:, :, 1:4].transpose(0, 1).requires_grad_()  # [s, b, 6, d] -> [b, s, 3, d]
    grad_out = draw((2, 3, 5, 12), seed=1)[0].float().to(device).transpose(1, 2)
    cos, sin = tables(shape, device)
    out, expected = triton(x, cos, sin), reference.apply_rope(x, cos, sin)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad_out), torch.autograd.grad(expected, x, grad_out))


def test_a_table_repeats_over_positions(device):
    """Decoding: [b, g, r, d] heads of one position, tables [b, 1, d/2]."""
    x = draw((2, 4, 3, 12))[0].float().to(device)
    cos, sin = tables((2, 1, 1, 12), device)
    torch.testing.assert_close(triton(x, cos, sin), apply_rope(x, cos, sin, backend="torch"))


def test_the_gradient_is_overwritten_only_where_it_may_be(device):
    shape = (2, 5, 3, 10)
    x, grad_out = (t.float().to(device) for t in draw(shape))
    cos, sin = tables(shape, device)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(reference.apply_rope(x, cos, sin), x, grad_out)
    kept = grad_out.clone()
    (grad,) = torch.autograd.grad(triton(x, cos, sin), x, grad_out)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(grad_out, kept)
    given = kept.clone()
    (grad,) = torch.autograd.grad(apply_rope(x, cos, sin, backend="triton", gradient_in_place=True), x, given)
    torch.testing.assert_close(grad, expected)
    assert grad.data_ptr() == given.data_ptr()
    expanded = torch.ones(1, device=device).expand(shape)  # every element is the same one: it cannot be overwritten
    (grad,) = torch.autograd.grad(apply_rope(x, cos, sin, backend="triton", gradient_in_place=True), x, expanded)
    torch.testing.assert_close(grad, torch.autograd.grad(reference.apply_rope(x, cos, sin), x, expanded)[0])


def test_a_gradient_of_sliding_windows_is_not_overwritten(device):
    """Heads that share numbers with their neighbours: no stride is 0."""
    shape = (2, 5, 3, 10)
    cos, sin = tables(shape, device)
    x = draw(shape)[0].float().to(device).requires_grad_()
    windows = draw((2, 5, 1, 20))[0].float().to(device).as_strided(shape, (100, 20, 5, 1))
    kept, expected = windows.clone(), torch.autograd.grad(reference.apply_rope(x, cos, sin), x, windows)[0]
    out = apply_rope(x, cos, sin, backend="triton", gradient_in_place=True)
    torch.testing.assert_close(torch.autograd.grad(out, x, windows)[0], expected)
    assert torch.equal(windows, kept)


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((2, 3, 4, 10), (120, 40, 10, 1), False),
        ((2, 3, 4, 10), (10, 80, 20, 1), False),  # in another order, with gaps
        ((1, 3, 4, 10), (0, 40, 10, 1), False),
        ((2, 3, 4, 10), (0, 40, 10, 1), True),
        ((2, 3, 4, 10), (120, 40, 9, 1), True),
        ((2, 3, 4, 10), (39, 40, 10, 1), True),
        ((2, 3, 4, 10), (120, 40, 1, 1), True),
    ],
)
def test_what_shares_memory(shape, strides, overlaps):
    from megatron_vlm_kernels.rope import _overlaps

    assert _overlaps(torch.empty(400).as_strided(shape, strides)) == overlaps


def test_nothing_to_rotate(device):
    x = torch.zeros(1, 0, 2, 4, device=device)
    assert triton(x, *tables(x.shape, device)).shape == x.shape


def test_what_it_cannot_take(device):
    x = torch.ones(1, 2, 2, 4, dtype=torch.float64, device=device)
    with pytest.raises(ConfigError, match="ops.rope: 'triton' cannot run: it computes in fp32"):
        triton(x, *tables(x.shape, device))
