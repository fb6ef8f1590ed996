"""Attention on one GPU: the libraries' backends against plain torch, and a ring's ranks in turn against one call."""

import importlib.util
from typing import Any

import pytest
import torch

from megatron_vlm.ops.attention import ATTENTION, attention, attention_backward
from megatron_vlm.ops.attention_blocks import Scoring
from megatron_vlm.ops.attention_mask import asked_of
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring_plan import RingPlan
from tests.helpers.packed import random_documents, visible
from tests.helpers.plain_attention import SCALE, draw, finite, plain, sides
from tests.helpers.ring_in_turn import ring_in_turn
from tests.kernels.accuracy import assert_as_exact

pytestmark = pytest.mark.gpu

CASES: list[tuple[tuple[int, int], dict[str, Any], tuple[str, ...]]] = [
    # (queries, keys), rules, the libraries that can
    ((256, 256), dict(causal=True), ("cudnn", "flash_attn")),
    ((200, 300), dict(causal=False), ("cudnn", "flash_attn")),
    ((200, 300), dict(causal=True), ("flash_attn",)),
    ((300, 200), dict(causal=True), ("flash_attn",)),  # the first hundred see nothing
    ((256, 256), dict(causal=True, window=50), ("flash_attn",)),
    ((256, 256), dict(causal=True, softcap=5.0), ("flash_attn",)),
]


@pytest.mark.parametrize("backend", ["cudnn", "flash_attn", "triton"])
@pytest.mark.parametrize(("lengths", "rules", "able"), CASES, ids=str)
def test_a_backend_is_as_exact_as_plain_torch(
    lengths: tuple[int, int], rules: dict[str, Any], able: tuple[str, ...], backend: str
) -> None:
    if backend not in (*able, "triton"):
        pytest.skip(f"{backend} states that it cannot")
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs the package flash_attn")
    tensors = draw(lengths, (8, 2), (128, 128), "cuda", torch.bfloat16)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    out, lse = attention(q, k, v, softmax_scale=SCALE, backend=backend, **rules)
    gradients = attention_backward(dout, q, k, v, out, lse, softmax_scale=SCALE, backend=backend, **rules)
    found = finite({"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))})
    assert_as_exact(found, *sides(tensors, rules))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attention(*leaves, softmax_scale=SCALE, backend=backend, **rules)[0].backward(dout)
    for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, found[name].to(leaf.dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("lengths", "rules", "able"), CASES, ids=str)
def test_auto_takes_who_can(lengths: tuple[int, int], rules: dict[str, Any], able: tuple[str, ...]) -> None:
    tensors = draw(lengths, (8, 2), (128, 128), "cuda", torch.bfloat16)
    asked = asked_of(tensors["q"], tensors["k"], tensors["v"], {**rules, "softmax_scale": SCALE})
    taken = ATTENTION.find("auto", tensors["q"], rules.get("softcap"), asked).name
    assert taken in (*able, "triton") and (taken == "cudnn") == ("cudnn" in able)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ring", [2, 4, 8])
def test_the_ranks_of_a_ring_are_one_call(ring: int, packed: bool, dtype: torch.dtype) -> None:
    """Errors do not grow with the ring: at most twice those of plain torch in one piece."""
    length = 1024
    whole = Documents.whole(length)
    documents = (random_documents(length, 9, 1), random_documents(length, 60, 2)) if packed else (whole, whole)
    tensors = draw((length, length), (8, 2), (128, 128), "cuda", dtype)
    plan = RingPlan(SequenceLayout(length, ring), documents)
    found = ring_in_turn(tensors, plan, Scoring(SCALE, None, "triton"))
    found |= {"out": found["out"].to(dtype), "lse": found["lse"].transpose(1, 2)}
    seen = torch.stack([visible(of_row, True, None) for of_row in documents])[:, None].cuda()
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    assert_as_exact(finite(found), plain(tensors, seen), plain(doubles, seen))
