"""The bias and GELU kernels against their twin."""

import pytest
import torch

from megatron_vlm.ops.projector import bias_gelu
from tests.kernels.accuracy import assert_as_exact

KINDS = ["exact", "tanh", "quick"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 33), (3, 5, 7), (35, 64), (2, 20, 300)]


def draw(shape, seed=0):
    """x, bias and the output's gradient, fp64."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, torch.randn(shape[-1], generator=generator, dtype=torch.float64), grad


def results(drawn, kind, dtype, device, backend):
    x, bias, grad = (t.to(dtype).to(device, copy=True) for t in drawn)
    out = bias_gelu(x.requires_grad_(), bias.requires_grad_(), kind, backend=backend)
    grad_x, grad_bias = torch.autograd.grad(out, (x, bias), grad)
    return {"out": out, "grad_x": grad_x, "grad_bias": grad_bias}


def compare(shape, kind, dtype, device, told=None):
    """`told`: the kind the kernel is told instead."""
    drawn = [t.to(dtype).double() for t in draw(shape)]
    assert_as_exact(
        results(drawn, told or kind, dtype, device, "triton"),
        results(drawn, kind, dtype, device, "reference"),
        results(drawn, kind, torch.float64, device, "reference"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, kind, dtype, device):
    compare(shape, kind, dtype, device)


@pytest.mark.parametrize("kind", KINDS)
def test_fp16(kind, device):
    compare((35, 64), kind, torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "told"), [("exact", "quick"), ("tanh", "quick"), ("quick", "exact")])
def test_another_gelu_is_found(kind, told, dtype, device):
    with pytest.raises(AssertionError, match="out: error"):
        compare((35, 64), kind, dtype, device, told)


def test_exact_and_tanh_are_told_apart_in_fp32(device):
    for kind, told in (("exact", "tanh"), ("tanh", "exact")):
        with pytest.raises(AssertionError, match="out: error"):
            compare((35, 64), kind, torch.float32, device, told)


def test_a_slope_without_its_bias_is_found(device, monkeypatch):
    from megatron_vlm_kernels import bias_gelu as kernels

    right = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda grad, x, bias, kind: right(grad, x, torch.zeros_like(bias), kind))
    with pytest.raises(AssertionError, match="grad_x: error"):
        compare((35, 64), "exact", torch.float32, device)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of exp(-u), which becomes 1 / inf
def test_large_values_saturate(device):
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]], device=device, requires_grad=True)
    for kind in KINDS:
        out = bias_gelu(x, torch.zeros(5, device=device), kind, backend="triton")
        (slope,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 50.0, 1e4]], device=device))
        torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))


def test_many_shares_are_added_up(device, monkeypatch):
    """More tiles of rows than partial rows of the bias' gradient."""
    from megatron_vlm_kernels import bias_gelu as kernels

    monkeypatch.setattr(kernels, "MAX_ROW_SHARES", 3)
    compare((100, 40), "tanh", torch.float32, device)


def test_rows_that_do_not_lie_together_and_none_at_all(device):
    x = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0)).to(device).transpose(0, 1)
    bias = torch.ones(32, device=device, requires_grad=True)
    torch.testing.assert_close(bias_gelu(x, bias, backend="triton"), bias_gelu(x, bias, backend="reference"))
    out = bias_gelu(x[:0], bias, backend="triton")
    assert out.shape == (0, 6, 32) and not torch.autograd.grad(out.sum(), bias)[0].any()


def test_only_what_backward_needs_is_kept(device):
    """The input as it came, and the bias."""
    kept = []
    x, bias = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(8, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bias_gelu(x, bias, backend="triton")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), bias.data_ptr()}
