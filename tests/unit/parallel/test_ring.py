"""Merging blocks, and a ring of one against the masked softmax; larger rings: distributed/test_context_attention.py."""

from typing import Any

import pytest
import torch

from megatron_vlm.ops.attention_blocks import merge
from megatron_vlm.parallel.context_attention import SharedSequence
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring import Ring, ring_attention
from megatron_vlm.parallel.ring_plan import RingPlan
from tests.helpers.models.attention_cases import ROWS, Case, distance, expected


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("mode", ["p2p", "all_gather"])
def test_a_ring_of_one_isolates_documents(rows: str, window: int | None, mode: str) -> None:
    case = Case(6, 3, rows, window=window, v_width=3)
    inputs = case.inputs()
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    ring = Ring(RingPlan(case.layout(1, 1), case.documents, True, window), mode=mode)
    out = ring_attention(*leaves, ring, kv_index=(0, 0, 1, 1, 2, 2), softmax_scale=case.softmax_scale)
    out.backward(inputs["dout"])
    found = {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}}
    for name, wanted in expected(case).items():
        assert distance(found[name], wanted) < 1e-6, name


@pytest.mark.parametrize("kv_index", [(0, 0, 0, 1), (0, 1, 1, 2), (1, 1, 2, 2)])
def test_heads_may_be_grouped_unevenly(kv_index: tuple[int, ...]) -> None:
    """As if every query head had a kv head of its own."""
    q, k, v = (torch.randn(1, 9, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 3, 3))
    ring = Ring(RingPlan(SequenceLayout(9), (Documents((0, 4), 9),)))
    out = ring_attention(q, k, v, ring, kv_index=kv_index, softmax_scale=0.5)
    alone = ring_attention(
        q, k[:, :, list(kv_index)], v[:, :, list(kv_index)], ring, kv_index=range(4), softmax_scale=0.5
    )
    torch.testing.assert_close(out, alone)
    weight = torch.randn(out.shape, dtype=out.dtype)
    for found, wanted in zip(
        torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(alone, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_a_rank_without_heads_gets_nothing() -> None:
    q, k, v = (torch.randn(1, 6, 0, width, requires_grad=True) for width in (4, 4, 3))
    ring = Ring(RingPlan(SequenceLayout(6), (Documents.whole(6),)))
    out = ring_attention(q, k, v, ring, kv_index=(), softmax_scale=1.0)
    out.sum().backward()
    assert out.shape == (1, 6, 0, 3) and k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize("lse", [-torch.inf, -1e4, -90.0, 0.0, 90.0, 1e4])
@pytest.mark.parametrize("block_lse", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_blocks_merge_whatever_their_weights(lse: float, block_lse: float) -> None:
    """Against fp64 with the larger taken out; log(1 + exp()) in fp32 overflows from 89 on."""
    out, block_out = torch.randn(2, 1, 1, 1, 4).double()
    found, found_lse = out.float(), torch.full((1, 1, 1), lse)
    merge(found, found_lse, block_out.float(), torch.full((1, 1, 1), block_lse))
    weights = torch.tensor([lse, block_lse], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(found.double(), weights[0] * out + weights[1] * block_out, rtol=1e-5, atol=1e-6)
    wanted_lse = torch.tensor([lse, block_lse], dtype=torch.float64).logsumexp(0)
    torch.testing.assert_close(found_lse.double().squeeze(), wanted_lse, rtol=1e-6, atol=1e-6)


def test_layers_of_one_window_share_a_ring() -> None:
    """One that hides nothing in the longest document is none, so that the plain blocks are taken."""
    ring = Ring(RingPlan(SequenceLayout(12), (Documents.packed([4, 7], 12), Documents.packed([5, 7], 12))))
    group: Any = None
    shared = SharedSequence(group, ring)
    assert shared.ring_of(True, None) is shared.ring_of(True, 7) is shared.ring_of(True, 100) is ring
    assert shared.ring_of(True, 6) is shared.ring_of(True, 6) is not ring and shared.ring_of(True, 6).plan.window == 6
    assert shared.ring_of(True, 3).plan.window == 3 and ring.plan.window is None
    assert shared.ring_of(False, 7) is shared.ring_of(False, None) is not ring
    assert not shared.ring_of(False, None).plan.causal and shared.ring_of(False, 3).plan.window == 3


def test_a_ring_and_its_group_have_one_size() -> None:
    with pytest.raises(AssertionError, match="a group of 1 ranks for a ring of 2"):
        Ring(RingPlan(SequenceLayout(8, ring=2), (Documents.whole(8),)))
