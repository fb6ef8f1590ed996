"""The linear layer that keeps the inputs of what is before it, not its result."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from megatron_vlm.ops.projector import bias_gelu, recomputed_linear

act = partial(bias_gelu, kind="exact", backend="torch")


def case():
    torch.manual_seed(0)
    sizes = ((5, 7), (5,), (2, 3, 7), (7,))
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda w, b, x, c: recomputed_linear(act, w, b, x, c), case())


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 2, 3), (0, 1, 2)])
def test_equals_plain_layers_whatever_is_frozen(frozen):
    inputs = case()
    for index in frozen:
        inputs[index].requires_grad_(False)
    weight, bias, x, added = inputs
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    ours = torch.autograd.grad(recomputed_linear(act, weight, bias, x, added).square().sum(), trained)
    plain = torch.autograd.grad(functional.linear(act(x, added), weight, bias).square().sum(), trained)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_a_bias_and_with_an_empty_batch():
    weight, _, x, added = case()
    torch.testing.assert_close(recomputed_linear(act, weight, None, x, added), functional.linear(act(x, added), weight))
    out = recomputed_linear(act, weight, None, x[:0], added)
    gradients = torch.autograd.grad(out.sum(), (weight, added))
    assert out.shape == (0, 3, 5) and not any(gradient.any() for gradient in gradients)


def test_a_function_that_changes_between_its_calls_is_found():
    """The planted fault: what backward computes again is not what forward had."""
    weight, bias, x, added = case()
    factors = iter((1.0, 1.1))
    wrong = recomputed_linear(lambda x, c: act(x, c) * next(factors), weight, bias, x, added)
    plain = functional.linear(act(x, added), weight, bias)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), weight)[0] for y in (wrong, plain)))
