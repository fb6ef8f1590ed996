"""The RMSNorm kernels, with and without the residual addition, against their twin."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import reference
from megatron_vlm.ops.norm import add_rms_norm, rms_norm
from tests.kernels.accuracy import assert_as_exact

EPS = 1e-5
SHAPES = [(1, 1), (3, 2, 7), (5, 64), (2, 33, 96), (70, 48)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(shape, seed=0):
    """x, residual, weight and the gradients of both outputs, fp64."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad_out, grad_sum = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x, residual, weight, grad_out, grad_sum


def results(function, drawn, dtype, device, with_residual=True):
    """Outputs and gradients by name; `function` as `reference.add_rms_norm`."""
    x, residual, weight, grad_out, grad_sum = (t.to(dtype).to(device, copy=True) for t in drawn)
    inputs = {"x": x, "weight": weight} | ({"residual": residual} if with_residual else {})
    for tensor in inputs.values():
        tensor.requires_grad_()
    out, total = function(x, residual if with_residual else None, weight, EPS)
    outputs = {"out": out} | ({"sum": total} if with_residual else {})
    wanted = (grad_out, grad_sum)[: len(outputs)]
    gradients = torch.autograd.grad(tuple(outputs.values()), tuple(inputs.values()), wanted)
    return outputs | {f"grad_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def triton(x, residual, weight, eps):
    if residual is None:
        return rms_norm(x, weight, eps, backend="triton"), x
    return add_rms_norm(x, residual, weight, eps, backend="triton")


def compare(drawn, dtype, device, with_residual=True, function=triton):
    # What a dtype cannot hold is no error of a kernel: the exact run starts from the rounded values too.
    rounded = [t.to(dtype).double() for t in drawn]
    assert_as_exact(
        results(function, rounded, dtype, device, with_residual),
        results(reference.add_rms_norm, rounded, dtype, device, with_residual),
        results(reference.add_rms_norm, rounded, torch.float64, device, with_residual),
    )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_torch(shape, dtype, with_residual, device):
    compare(draw(shape), dtype, device, with_residual)


def test_fp16(device):
    compare(draw((5, 64)), torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 48), (3, 5000)])
def test_several_tiles(shape, dtype, device, tiles_of_a_gpu):
    compare(draw(shape), dtype, device)


def test_a_residual_that_takes_no_part_in_the_norm_is_found(device):
    def wrong(x, residual, weight, eps):
        return rms_norm(x, weight, eps, backend="triton"), x + residual

    with pytest.raises(AssertionError, match="out: error"):
        compare(draw((5, 64)), torch.float32, device, function=wrong)


def test_a_lost_row_of_the_weights_gradient_is_found(device, monkeypatch):
    """As if one program's share were not added up."""
    from megatron_vlm_kernels import rms_norm as kernels

    right = kernels.norm_backward

    def short(grad_out, grad_sum, total, weight, inverse, weight_trains):
        grad_in, _ = right(grad_out, grad_sum, total, weight, inverse, False)
        _, grad_weight = right(grad_out[:-1], grad_sum[:-1], total[:-1], weight, inverse[:-1], True)
        return grad_in, grad_weight

    monkeypatch.setattr(kernels, "norm_backward", short)
    with pytest.raises(AssertionError, match="grad_weight: error"):
        compare(draw((40, 64)), torch.float32, device)


def test_rows_that_do_not_lie_together(device):
    x = draw((6, 5, 32))[0].float().to(device).transpose(0, 1)
    weight = torch.ones(32, device=device)
    ours = rms_norm(x, weight, EPS, backend="triton")
    torch.testing.assert_close(ours, rms_norm(x, weight, EPS, backend="reference"), rtol=1e-5, atol=1e-6)


def test_only_what_trains_has_a_gradient(device):
    x, residual, weight, grad_out, grad_sum = (t.float().to(device) for t in draw((9, 32)))
    x.requires_grad_()
    expected = torch.autograd.grad(reference.add_rms_norm(x, residual, weight, EPS)[0], x, grad_out)[0]
    out, total = add_rms_norm(x, residual, weight, EPS, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(out, x, grad_out, retain_graph=True)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(total, x, grad_sum)[0], grad_sum)  # the norm is not used


def test_no_rows(device):
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    out, total = add_rms_norm(x, x, weight, EPS, backend="triton")
    grads = torch.autograd.grad((out, total), (x, weight), (out, total))
    assert out.shape == total.shape == grads[0].shape == (0, 16) and not grads[1].any()


def test_what_it_cannot_take(device):
    wide = torch.ones(2, 16, device=device, dtype=torch.float64)
    with pytest.raises(ConfigError, match="ops.norm: 'triton' cannot run: it computes in fp32 .* found torch.float64"):
        rms_norm(wide, wide[0], EPS, backend="triton")
    with pytest.raises(ConfigError, match="it needs one dtype, found torch.float64 and torch.float32"):
        rms_norm(wide, wide[0].float(), EPS, backend="triton")
    with pytest.raises(ConfigError, match="it needs rows of at most 16,384, .* found 70,000"):
        rms_norm(torch.ones(1, 70_000, device=device), torch.ones(70_000, device=device), EPS, backend="triton")
