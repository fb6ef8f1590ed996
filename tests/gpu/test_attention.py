"""Attention on one GPU: the libraries' backends against plain torch, and a ring's ranks in turn against one call."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops.attention import ATTENTION, attention, attention_backward
from megatron_vlm.ops.attention_blocks import Scoring
from megatron_vlm.ops.attention_mask import attention_call
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring_plan import RingPlan
from tests.helpers.data.packed import random_documents, visible
from tests.helpers.models.plain_attention import SCALE, draw, finite, plain, sides
from tests.helpers.ranks.ring_in_turn import ring_in_turn
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


def needs(backend: str) -> None:
    """Skips where its package is missing."""
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs the package flash_attn")


def results(tensors: dict[str, Tensor], rules: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """out, lse and the fp32 gradients."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    out, lse = attention(q, k, v, softmax_scale=SCALE, backend=backend, **rules)
    gradients = attention_backward(dout, q, k, v, out, lse, softmax_scale=SCALE, backend=backend, **rules)
    return finite({"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))})


@pytest.mark.parametrize("backend", ["cudnn", "flash_attn", "triton"])
@pytest.mark.parametrize(("lengths", "rules", "able"), CASES, ids=str)
def test_a_backend_is_as_exact_as_plain_torch(
    lengths: tuple[int, int], rules: dict[str, Any], able: tuple[str, ...], backend: str
) -> None:
    if backend not in (*able, "triton"):
        pytest.skip(f"{backend} states that it cannot")
    needs(backend)
    tensors = draw(lengths, (8, 2), (128, 128), "cuda", torch.bfloat16)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    found = results(tensors, rules, backend)
    assert_as_exact(found, *sides(tensors, rules))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attention(*leaves, softmax_scale=SCALE, backend=backend, **rules)[0].backward(dout)
    for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, found[name].to(leaf.dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("lengths", "rules", "able"), CASES, ids=str)
def test_auto_takes_who_can(lengths: tuple[int, int], rules: dict[str, Any], able: tuple[str, ...]) -> None:
    tensors = draw(lengths, (8, 2), (128, 128), "cuda", torch.bfloat16)
    asked = attention_call(tensors["q"], tensors["k"], tensors["v"], {**rules, "softmax_scale": SCALE})
    taken = ATTENTION.find("auto", tensors["q"], rules.get("softcap"), asked).name
    assert taken in (*able, "triton") and (taken == "cudnn") == ("cudnn" in able)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("widths", [(256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("rules", [dict(causal=True), dict(causal=False, softcap=5.0)], ids=str)
def test_wide_heads(rules: dict[str, Any], widths: tuple[int, int], dtype: torch.dtype) -> None:
    """Sizes of their own, which the interpreter does not ask for; a token's few queries, too."""
    for lengths in ((300, 300), (4, 300)):
        tensors = draw(lengths, (4, 2), widths, "cuda", dtype)
        assert_as_exact(results(tensors, rules, "triton"), *sides(tensors, rules))


RINGS = [  # backend, dtype, packed, rings
    ("triton", torch.float32, False, (2, 4, 8)),
    ("triton", torch.float32, True, (2, 4, 8)),
    ("triton", torch.bfloat16, False, (2, 4, 8)),
    ("triton", torch.bfloat16, True, (2, 4, 8)),
    ("flash_attn", torch.bfloat16, False, (2, 4)),
    ("flash_attn", torch.bfloat16, True, (2, 4)),
    ("cudnn", torch.bfloat16, False, (2, 4)),  # of cut documents it is refused
]


@pytest.mark.parametrize(
    ("backend", "dtype", "packed", "ring"),
    [(*case, ring) for *case, rings in RINGS for ring in rings],
    ids=str,
)
def test_the_ranks_of_a_ring_are_one_call(backend: str, dtype: torch.dtype, packed: bool, ring: int) -> None:
    """By our kernels errors do not grow with the ring: at most twice those of plain torch in one piece. A library
    rounds what each of the ring's steps gives."""
    needs(backend)
    length = 1024
    whole = Documents.whole(length)
    documents = (random_documents(length, 9, 1), random_documents(length, 60, 2)) if packed else (whole, whole)
    tensors = draw((length, length), (8, 2), (128, 128), "cuda", dtype)
    plan = RingPlan(SequenceLayout(length, ring), documents)
    found = ring_in_turn(tensors, plan, Scoring(SCALE, None, backend))
    found |= {"out": found["out"].to(dtype), "lse": found["lse"].transpose(1, 2)}
    if backend != "triton":
        found |= {name: found[name].to(dtype) for name in ("dq", "dk", "dv")}
    seen = torch.stack([visible(of_row, True, None) for of_row in documents])[:, None].cuda()
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    assert_as_exact(finite(found), plain(tensors, seen), plain(doubles, seen))
