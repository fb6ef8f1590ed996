"""Attention's masks, soft-cap and value width; its backward, block by block, from the final output and log-sum-exp."""

import math
from unittest import mock

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import reference
from megatron_vlm.ops.attention import attention, attention_backward
from tests.unit.ops.attention_loops import by_loops
from tests.unit.ops.attention_rules import HEADS, RULES, B, D, inputs

CAPPED = [(7, 7, 2, dict(causal=True, softcap=0.7)), (5, 9, 3, dict(causal=False, softcap=2.0, window=6))]


def key_valid(sk):
    """Row 1 begins with two keys of padding."""
    return torch.arange(sk)[None] >= torch.tensor([0, 2])[:, None]


def expected_results(tensors, dout, rules):
    """(out, lse, dq, dk, dv) in float64 by autograd through the twin."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    out, lse = reference.attention(*doubles, softmax_scale=0.4, **rules)
    return [out.detach(), lse, *torch.autograd.grad(out, doubles, dout.double())]


def assert_equal(ours, expected, rtol=1e-5, atol=3e-6):
    for one, other in zip(ours, expected, strict=True):
        assert not one.isnan().any()
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("width", [3, D, 11])
@pytest.mark.parametrize(("sq", "sk", "kv_heads", "rules"), RULES + CAPPED)
def test_reference_equals_a_loop_over_pairs(sq, sk, kv_heads, rules, width):
    (q, k, v), _ = inputs(sq, sk, kv_heads, width)
    valid = key_valid(sk)
    ours = reference.attention(q, k, v, softmax_scale=0.4, key_valid=valid, **rules)
    assert ours[0].shape == (B, sq, HEADS, width)
    assert_equal([x.detach() for x in ours], by_loops(q.detach(), k.detach(), v.detach(), valid, **rules))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("width", [3, D, 11])
@pytest.mark.parametrize(("sq", "sk", "kv_heads", "rules"), RULES)
def test_cpu_equals_reference_with_gradients(sq, sk, kv_heads, rules, width, padded):
    tensors, dout = inputs(sq, sk, kv_heads, width)
    rules = rules | ({"key_valid": key_valid(sk)} if padded else {})
    out, lse = attention(*tensors, softmax_scale=0.4, backend="cpu", **rules)
    gradients = torch.autograd.grad(out, tensors, dout)
    assert_equal([out.detach(), lse, *gradients], expected_results(tensors, dout, rules))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("width", [3, D, 11])
@pytest.mark.parametrize(
    ("backend", "sq", "sk", "kv_heads", "rules"),
    [("cpu", *case) for case in RULES] + [("reference", *case) for case in RULES + CAPPED],
)
def test_backward_equals_autograd(backend, sq, sk, kv_heads, rules, width, padded):
    tensors, dout = inputs(sq, sk, kv_heads, width)
    rules = rules | ({"key_valid": key_valid(sk)} if padded else {})
    out, lse, *expected = expected_results(tensors, dout, rules)
    q, k, v = (x.detach() for x in tensors)
    gradients = attention_backward(dout, q, k, v, out.float(), lse.float(), softmax_scale=0.4, backend=backend, **rules)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert_equal(gradients, expected)


def gradients_by_blocks(tensors, dout, out, lse, rules, backend, cut):
    """dq, dk, dv as a ring sums them: queries and keys cut into blocks, each block from the final out and lse.

    `cut` is (sizes of the query blocks, sizes of the key blocks); a block's offset tells it where it stands.
    """
    q, k, v = (x.detach() for x in tensors)
    offset = k.shape[1] - q.shape[1] if rules.get("offset") is None else rules["offset"]
    totals = [torch.zeros_like(x) for x in (q, k, v)]
    q_start = 0
    for num_queries in cut[0]:
        queries, k_start = slice(q_start, q_start + num_queries), 0
        for num_keys in cut[1]:
            keys = slice(k_start, k_start + num_keys)
            block_rules = rules | {"offset": offset + q_start - k_start, "softmax_scale": 0.4, "backend": backend}
            shares = attention_backward(
                dout[:, queries],
                q[:, queries],
                k[:, keys],
                v[:, keys],
                out[:, queries],
                lse[..., queries],
                **block_rules,
            )
            for total, share, where in zip(totals, shares, (queries, keys, keys), strict=True):
                total[:, where] += share
            k_start += num_keys
        q_start += num_queries
    return totals


BLOCK_CASES = [
    (12, 12, 2, dict(causal=True), ([5, 7], [4, 1, 7])),
    (12, 12, 2, dict(causal=True, window=4), ([6, 6], [3, 3, 3, 3])),
    (12, 12, 3, dict(causal=False), ([12], [5, 7])),
    (9, 6, 2, dict(causal=True), ([4, 5], [2, 4])),  # three queries see no key in any block
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("sq", "sk", "kv_heads", "rules", "cut"), BLOCK_CASES)
def test_gradients_of_blocks_sum_to_the_whole(sq, sk, kv_heads, rules, cut, backend):
    tensors, dout = inputs(sq, sk, kv_heads)
    out, lse, *expected = expected_results(tensors, dout, rules)
    assert_equal(gradients_by_blocks(tensors, dout, out.float(), lse.float(), rules, backend, cut), expected)


def test_the_block_comparison_fails_without_the_final_lse_or_out():
    tensors, dout = inputs(12, 12, 2)
    rules, cut = dict(causal=True), ([12], [5, 7])
    out, lse, *expected = expected_results(tensors, dout, rules)
    (q, k, v), first = tensors, slice(0, 5)
    own_out, own_lse = attention(q, k[:, first], v[:, first], causal=True, offset=0, softmax_scale=0.4)
    for wrong_out, wrong_lse in ((own_out.detach(), lse.float()), (out.float(), own_lse)):
        with pytest.raises(AssertionError):
            assert_equal(gradients_by_blocks(tensors, dout, wrong_out, wrong_lse, rules, "cpu", cut), expected)


@pytest.mark.parametrize("sq", [3, 700])
def test_tiles_that_a_query_does_not_see_at_all(sq):
    """Longer than the kernel's own tiles, with whole tiles hidden, and queries that see nothing."""
    tensors, dout = inputs(sq, 1500, 2)
    rules = dict(causal=True, offset=1490, window=40)
    expected = expected_results(tensors, dout, rules)
    q, k, v = (x.detach() for x in tensors)
    out, lse = attention(q, k, v, softmax_scale=0.4, backend="cpu", **rules)
    gradients = attention_backward(dout, q, k, v, out, lse, softmax_scale=0.4, backend="cpu", **rules)
    assert_equal([out, lse, *gradients], expected, rtol=1e-4, atol=1e-5)


def test_backward_in_bf16_is_summed_in_fp32():
    """Rounded inputs, but no rounding of what a ring adds up."""
    tensors, dout = inputs(12, 12, 2, dtype=torch.bfloat16)
    rules, cut = dict(causal=True), ([12], [5, 7])
    out, lse, *expected = expected_results(tensors, dout, rules)
    q, k, v = (x.detach() for x in tensors)
    gradients = attention_backward(dout, q, k, v, out.float(), lse.float(), softmax_scale=0.4, **rules)
    assert all(x.dtype == torch.float32 for x in gradients)
    assert_equal(gradients, expected)
    with pytest.raises(AssertionError):  # blocks rounded to bf16 as they are added, by zeros_like
        assert_equal(gradients_by_blocks(tensors, dout, out.float(), lse.float(), rules, "cpu", cut), expected)


def test_soft_cap_is_refused_by_the_cpu_kernel_and_taken_by_auto():
    (q, k, v), dout = inputs(7, 7, 2)
    rules = dict(causal=True, softmax_scale=0.4, softcap=2.0)
    with pytest.raises(ConfigError, match="'cpu' cannot run: it has no soft-cap of the scores, found 2.0"):
        attention(q, k, v, backend="cpu", **rules)
    with pytest.raises(ConfigError, match="it has no soft-cap"):
        attention_backward(dout, q, k, v, dout, torch.zeros(B, HEADS, 7), backend="cpu", **rules)
    assert torch.equal(attention(q, k, v, **rules)[0], reference.attention(q, k, v, **rules)[0])


@pytest.mark.parametrize(
    "rules",
    [
        dict(causal=True),
        dict(causal=True, window=7),
        dict(causal=True, offset=6),
        dict(causal=True, offset=9, window=16),
        dict(causal=False, window=math.inf),
    ],
)
def test_a_mask_without_effect_is_never_written(rules):
    """What long sequences rely on: [sq, sk] numbers would not fit."""
    (q, k, v), _ = inputs(7, 7, 2)
    with mock.patch.object(reference, "visible_keys", side_effect=AssertionError("a mask")):
        attention(q, k, v, softmax_scale=0.4, backend="cpu", **rules)
        with pytest.raises(AssertionError, match="a mask"):
            attention(q, k, v, softmax_scale=0.4, backend="cpu", causal=True, window=6)


def test_nothing_to_attend_is_refused_before_the_kernel_dies_of_it():
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 2, 8)
    for queries, keys in ((q[:, :0], k), (q, k[:, :0]), (q[:, :, :0], k[:, :, :0])):
        with pytest.raises(AssertionError, match="attention of nothing"):
            attention(queries, keys, keys, causal=False, softmax_scale=1.0)
