"""The gated unit's kernels against their twin, on gate and up that lie side by side."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import reference
from megatron_vlm.ops.activation import gated
from tests.kernels.accuracy import assert_as_exact

SHAPES = [(1, 18), (3, 4, 14), (5, 128), (2, 3, 250)]
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]


def draw(shape, seed=0):
    """x [..., 2f] with some large values, and the gradient of the output, fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, dtype=torch.float64)


def results(function, drawn, activation, dtype, device):
    x, grad_out = (t.to(dtype).to(device, copy=True) for t in drawn)
    out = function(x.requires_grad_(), activation)
    return {"out": out, "grad_x": torch.autograd.grad(out, x, grad_out)[0]}


def triton(x, activation):
    return gated(x, activation, backend="triton")


def compare(drawn, activation, dtype, device, function=triton):
    rounded = [t.to(dtype).double() for t in drawn]
    assert_as_exact(
        results(function, rounded, activation, dtype, device),
        results(reference.gated, rounded, activation, dtype, device),
        results(reference.gated, rounded, activation, torch.float64, device),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_torch(shape, dtype, activation, device):
    compare(draw(shape), activation, dtype, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp16(activation, device):
    compare(draw((5, 128)), activation, torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2050), (20, 130)])
def test_several_tiles(shape, dtype, device, tiles_of_a_gpu):
    compare(draw(shape), "silu", dtype, device)


def test_up_before_gate_is_found(device):
    def swapped(x, activation):
        gate, up = x.chunk(2, dim=-1)
        return gated(torch.cat([up, gate], dim=-1), activation, backend="triton")

    with pytest.raises(AssertionError, match="out: error"):
        compare(draw((5, 128)), "silu", torch.float32, device, swapped)


def test_the_other_gelu_is_found(device):
    """Its tanh form differs by a thousandth: the measure tells them apart."""
    with pytest.raises(AssertionError, match="out: error"):
        compare(draw((5, 128)), "gelu", torch.float32, device, lambda x, _: gated(x, "gelu_tanh", backend="triton"))


def test_a_slope_without_its_second_term_is_found(device, monkeypatch):
    from megatron_vlm_kernels import gated as kernels

    def wrong(grad_out, x, activation):
        gate, up = x.chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        return torch.cat([grad_out * up * share, grad_out * gate * share], dim=-1)

    monkeypatch.setattr(kernels, "gated_backward", wrong)
    with pytest.raises(AssertionError, match="grad_x: error"):
        compare(draw((5, 128)), "silu", torch.float32, device)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of an exponential, which becomes 1 / inf
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_nothing_overflows(activation, device):
    x = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0]], device=device, requires_grad=True)
    out = gated(x, activation, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, reference.gated(x, activation))
    assert grad.isfinite().all() and grad[0, :4].tolist() == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of an exponential, which becomes 1 / inf
def test_slopes_of_large_gates_do_not_cancel(device):
    """1 + z - z s(z) would lose a bit of 1 with each bit of z, and all of it from 2^24 on."""
    gates = torch.tensor([17.3, 100.3, 1000.3, 3e4, 5e5, 1e8, -17.3, -40.1], dtype=torch.float32, device=device)
    x = torch.cat([gates, torch.ones_like(gates)])[None].requires_grad_()
    (grad,) = torch.autograd.grad(gated(x, "silu", backend="triton").sum(), x)
    z = gates.double()
    slopes = z.sigmoid() * (1 + z * (-z).sigmoid())
    torch.testing.assert_close(grad[0, :8].double(), slopes, rtol=1e-5, atol=0)


def test_rows_that_do_not_lie_together(device):
    x, grad_out = (t.float().to(device) for t in draw((4, 6, 32)))
    x = x.transpose(0, 1).requires_grad_()
    out, expected = gated(x, "silu", backend="triton"), reference.gated(x, "silu")
    torch.testing.assert_close(out, expected)
    grad_out = grad_out.transpose(0, 1)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad_out), torch.autograd.grad(expected, x, grad_out))


def test_no_rows(device):
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    out = gated(x, "silu", backend="triton")
    assert out.shape == (0, 4) and torch.autograd.grad(out, x, out)[0].shape == (0, 8)


def test_what_it_cannot_take(device):
    with pytest.raises(ConfigError, match="ops.activation: 'triton' cannot run: it computes in fp32"):
        gated(torch.ones(2, 8, dtype=torch.float64, device=device), "silu", backend="triton")
