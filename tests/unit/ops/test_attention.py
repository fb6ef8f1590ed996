"""Attention: the twin against a loop over pairs, the backends against the twin, forward, log-sum-exp and gradients."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import reference
from megatron_vlm.ops.attention import attention
from tests.unit.ops.attention_loops import by_loops

B, HEADS, D = 2, 6, 5
SHAPES = [(7, 7, 6), (7, 7, 2), (1, 9, 2), (3, 9, 1)]  # queries, keys, kv heads


def inputs(sq, sk, kv_heads, dtype=torch.float32, left_padding=(0, 3)):
    generator = torch.Generator().manual_seed(sq * 100 + sk * 10 + kv_heads)
    q = torch.randn(B, sq, HEADS, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (
        torch.randn(B, sk, kv_heads, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    )
    valid = torch.arange(sk)[None] >= torch.tensor(left_padding)[:, None]
    return q, k, v, valid


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_a_loop_over_pairs(shape, causal):
    q, k, v, valid = inputs(*shape)
    out, lse = reference.attention(q, k, v, causal=causal, softmax_scale=0.4, key_valid=valid)
    expected_out, expected_lse = by_loops(q.detach(), k.detach(), v.detach(), valid, causal)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)


def results(backend, tensors, causal, valid, scale=0.4):
    out, lse = attention(*tensors, causal=causal, softmax_scale=scale, key_valid=valid, backend=backend)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, lse, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_equals_reference_with_gradients(shape, causal, padded):
    *tensors, valid = inputs(*shape)
    valid = valid if padded else None
    for ours, expected in zip(
        results("cpu", tensors, causal, valid), results("reference", tensors, causal, valid), strict=True
    ):
        assert ours.dtype == torch.float32 and not ours.isnan().any()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def test_the_comparison_fails_for_top_left_alignment_and_wrong_groups():
    """The two mistakes the kernels invite: their own causal mask, and kv heads repeated in the wrong order."""
    q, k, v, _ = inputs(3, 9, 2)
    expected, _ = attention(q, k, v, causal=True, softmax_scale=0.4, backend="reference")
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    top_left, _ = kernel(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, True, scale=0.4)
    interleaved, _ = attention(
        q, *(x.repeat(1, 1, 3, 1) for x in (k, v)), causal=True, softmax_scale=0.4, backend="reference"
    )
    for wrong in (top_left.transpose(1, 2), interleaved):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, expected, rtol=1e-5, atol=2e-6)


def test_bf16_is_within_its_own_rounding_of_fp32():
    *tensors, _ = inputs(7, 7, 2)
    exact = results("reference", tensors, True, None)
    rounded = results("cpu", [x.detach().bfloat16().requires_grad_() for x in tensors], True, None)
    assert rounded[0].dtype == torch.bfloat16 and rounded[1].dtype == torch.float32
    for ours, expected in zip(rounded, exact, strict=True):
        assert (ours.float() - expected).norm() < 0.02 * expected.norm()


def test_a_backend_that_cannot_run_says_why():
    q = torch.zeros(1, 2, 2, 4, device="meta")
    with pytest.raises(ConfigError, match="'cpu' cannot run: it needs tensors on the CPU, found meta"):
        attention(q, q, q, causal=True, softmax_scale=1.0, backend="cpu")
