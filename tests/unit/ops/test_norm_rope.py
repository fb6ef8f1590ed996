"""RMSNorm and RoPE against their twins and against transformers' Llama."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_vlm.ops import reference
from megatron_vlm.ops.norm import rms_norm
from megatron_vlm.ops.rope import apply_rope, rope_tables


def test_rms_norm_equals_twin_and_transformers_with_gradients():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 16, requires_grad=True), (1 + torch.randn(16)).requires_grad_()
    theirs = LlamaRMSNorm(16, eps=1e-3)
    theirs.weight = torch.nn.Parameter(weight.detach().clone())
    ours, twin = rms_norm(x, weight, 1e-3), reference.rms_norm(x, weight, 1e-3)
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, theirs(x), rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, twin)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # eps inside the root matters
        torch.testing.assert_close(rms_norm(x, weight, 0.0), twin, rtol=1e-6, atol=1e-6)


def rope_case():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=12, rope_theta=500.0)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 700]])  # the second row: packed documents
    q, k = torch.randn(2, 5, 4, 12), torch.randn(2, 5, 2, 12)
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(q, positions)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q, k, positions, rotary.inv_freq, [x.transpose(1, 2) for x in expected]


def test_rope_equals_twin_and_transformers():
    q, k, positions, frequencies, expected = rope_case()
    tables = rope_tables(positions, frequencies)
    for x, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(apply_rope(x, *tables), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(reference.apply_rope(x, *tables), wanted, rtol=1e-6, atol=1e-6)


def test_rope_off_by_one_fails_and_shifts_of_both_do_not():
    """Off by one for the query alone changes every score; for both it changes none: only differences count."""
    q, k, positions, frequencies, expected = rope_case()
    shifted = rope_tables(positions + 1, frequencies)
    scores = torch.einsum("bqhd,bkhd->bhqk", expected[0][:, :, :2], expected[1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(apply_rope(q, *shifted), expected[0], rtol=1e-6, atol=1e-6)
    moved = torch.einsum("bqhd,bkhd->bhqk", apply_rope(q, *shifted)[:, :, :2], apply_rope(k, *shifted))
    torch.testing.assert_close(moved, scores, rtol=1e-4, atol=1e-4)


def test_rope_scaling_multiplies_the_tables():
    positions, frequencies = torch.arange(3)[None], torch.tensor([1.0, 0.1])
    cos, sin = rope_tables(positions, frequencies, scaling=2.0)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((1, 3, 2), 4.0))
