"""Kernels on tensors whose last row lies beyond 2^31 numbers: an offset of 32 bits would read and write elsewhere.

Where a kernel takes strides, two rows lie that far apart; where it takes contiguous rows, there are that many numbers.
Memory: up to 22 GB.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops.activation import gated
from megatron_vlm.ops.attention import attention, attention_backward
from megatron_vlm.ops.norm import add_rms_norm
from megatron_vlm.ops.projector import bias_gelu, space_to_depth_norm
from megatron_vlm.ops.reference_projector import Blocks
from megatron_vlm.ops.rope import apply_rope, rope_tables

pytestmark = pytest.mark.gpu

FAR = 2**31 + 256
TAIL = 7  # rows that are compared


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def near(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()


def far(tensor: Tensor) -> Tensor:
    """The same two rows [2, ...], the second one behind 2^31 numbers."""
    assert len(tensor) == 2
    storage = torch.empty(FAR + tensor[0].numel(), dtype=tensor.dtype, device="cuda")
    view = storage.as_strided(tensor.shape, (FAR, *tensor[0].stride()))
    view.copy_(tensor)
    return view


def test_attention_of_rows_far_apart() -> None:
    q, k, v, dout = (near(2, 70, heads, 64) for heads in (4, 2, 2, 4))
    rules = {"causal": True, "softmax_scale": 0.1, "backend": "triton"}
    out, lse = attention(q, k, v, **rules)
    expected = [out, lse, *attention_backward(dout, q, k, v, out, lse, **rules)]
    for name, moved in (("q", far(q)), ("k", far(k)), ("v", far(v)), ("dout", far(dout))):
        inputs = {"dout": dout, "q": q, "k": k, "v": v} | {name: moved}
        found_out, found_lse = attention(inputs["q"], inputs["k"], inputs["v"], **rules)
        found = [found_out, found_lse, *attention_backward(*inputs.values(), out, lse, **rules)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), name


def test_rope_of_rows_far_apart() -> None:
    x = near(2, 9, 4, 64)
    tables = rope_tables(torch.arange(9, device="cuda")[None], torch.linspace(1, 0.1, 32, device="cuda"))
    assert torch.equal(apply_rope(far(x), *tables, backend="triton"), apply_rope(x, *tables, backend="triton"))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(apply_rope(leaf, *tables, backend="triton"), leaf, x)
    given = far(x)
    (grad,) = torch.autograd.grad(apply_rope(leaf, *tables, backend="triton", gradient_in_place=True), leaf, given)
    assert grad.data_ptr() == given.data_ptr() and torch.equal(grad, expected)


def test_space_to_depth_of_images_far_apart() -> None:
    x, weight, bias = near(2, 16, 32), near(128), near(128)
    blocks = Blocks(4, 4, 2, "row")
    found = []
    for images in (x.clone(), far(x)):
        inputs = images.requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
        out = space_to_depth_norm(inputs[0], blocks, *inputs[1:], 1e-5, backend="triton")
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def long(width: int) -> Tensor:
    """[t, width] of more than 2^31 numbers, zeros but for the last rows."""
    x = torch.zeros(2**31 // width + 64, width, dtype=torch.bfloat16, device="cuda")
    x[-TAIL:] = near(TAIL, width)
    return x


def test_gates_of_many_rows() -> None:
    x = long(8192)
    short = x[-TAIL:].clone().requires_grad_()
    expected = gated(short, "silu", backend="triton")
    (expected_grad,) = torch.autograd.grad(expected, short, torch.ones_like(expected))
    x.requires_grad_()
    out = gated(x, "silu", backend="triton")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(out[-TAIL:], expected) and torch.equal(grad[-TAIL:], expected_grad)


def test_norm_of_many_rows() -> None:
    x, weight = long(8192), near(8192)
    short, residual = x[-TAIL:].clone().requires_grad_(), x
    expected = add_rms_norm(short, short.detach(), weight, 1e-5, backend="triton")
    (expected_grad,) = torch.autograd.grad(expected[0], short, torch.ones_like(expected[0]))
    out, total = add_rms_norm(leaf := x.detach().requires_grad_(), residual.detach(), weight, 1e-5, backend="triton")
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    found = out[-TAIL:], total[-TAIL:], grad[-TAIL:]
    assert all(torch.equal(one, other) for one, other in zip(found, (*expected, expected_grad), strict=True))


def test_bias_and_gelu_of_many_rows() -> None:
    x, bias = long(8192), near(8192)
    short = x[-TAIL:].clone().requires_grad_()
    expected = bias_gelu(short, bias, backend="triton")
    (expected_grad,) = torch.autograd.grad(expected, short, torch.ones_like(expected))
    x.requires_grad_()
    out = bias_gelu(x, bias, backend="triton")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(out[-TAIL:], expected) and torch.equal(grad[-TAIL:], expected_grad)
