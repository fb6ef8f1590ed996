"""Cases of attention: a causal row, and the work of a rank of a ring, folded or merged.

The second is a rank of a ring of RING, its steps one after the other with keys that lie ready: the sides are the
backends of `ops.attention_blocks`, so "calls" is the fastest backend of `ops.attention` with a merge of its own, and
the plain twin the same of plain torch's. Work is counted over visible pairs: two products forward, five backward.

Letters: s positions of a row, d head width; of a ring: L tokens of the row, S = L / RING tokens of the rank.
"""

from typing import Any

import torch

from megatron_vlm.ops import reference
from megatron_vlm.ops.attention import ATTENTION, attention, attention_backward
from megatron_vlm.ops.attention_blocks import (
    ATTENTION_INTO,
    ATTENTION_INTO_BACKWARD,
    Rectangle,
    Rectangles,
    SavedForward,
    Scoring,
)
from megatron_vlm.ops.dispatch import AUTO

from .case import Backward, Case, Draw, Outputs, Sizes, Tensors, Work

RING = 8


def _attention_sizes(positions: int, heads: int = 32, kv_heads: int = 8, width: int = 128) -> Sizes:
    return {"positions": positions, "heads": heads, "kv_heads": kv_heads, "width": width}


# --- a causal row -----------------------------------------------------------------------------------------------------


def _draw_attention(sizes: Sizes, draw: Draw) -> Tensors:
    s, d = sizes["positions"], sizes["width"]
    heads = {"q": sizes["heads"], "k": sizes["kv_heads"], "v": sizes["kv_heads"]}
    return {name: draw.normal(1, s, number, d) for name, number in heads.items()}


def _attention_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    """Work of a causal mask: half the pairs."""
    s, d = sizes["positions"], sizes["width"]
    q, kv = s * sizes["heads"] * d * element, s * sizes["kv_heads"] * d * element
    flops = 2 * s * s * d * sizes["heads"]
    return Work(2 * q + 2 * kv, flops), Work(4 * q + 4 * kv, flops * 5 // 2)


def _attention_rules(inputs: Tensors) -> Any:
    return {"causal": True, "softmax_scale": inputs["q"].shape[-1] ** -0.5}


def _attention_backward(backend: str) -> Backward:
    def run(x: Tensors, outputs: Outputs, grads: Outputs) -> Outputs:
        rules = _attention_rules(x)
        return attention_backward(grads[0], x["q"], x["k"], x["v"], *outputs, backend=backend, **rules)

    return run


ATTENTION_CASE = Case(
    op="attention",
    operation=ATTENTION,
    call=lambda x, backend: attention(x["q"], x["k"], x["v"], backend=backend, **_attention_rules(x)),
    reference=lambda x: reference.attention(x["q"], x["k"], x["v"], **_attention_rules(x)),
    trained=(),
    draw=_draw_attention,
    work=_attention_work,
    sizes=tuple(_attention_sizes(s) for s in (4096, 16384, 65536, 131072)) + (_attention_sizes(16384, 28, 4),),
    tiny=(_attention_sizes(24, 4, 2, 16),),
    exact=_attention_sizes(1024),
    backward=_attention_backward,
    reference_backward=lambda x, outputs, grads: reference.attention_backward(
        grads[0], x["q"], x["k"], x["v"], *outputs, **_attention_rules(x)
    ),
    compiles=False,  # its twin makes all scores: nobody would train so
)

# --- a rank of a ring -------------------------------------------------------------------------------------------------


def _draw_ring(sizes: Sizes, draw: Draw) -> Tensors:
    """q [1, S, heads, d], k and v [1, L, kv_heads, d]."""
    length, d = sizes["positions"], sizes["width"]
    k, v = (draw.normal(1, length, sizes["kv_heads"], d) for _ in range(2))
    return {"q": draw.normal(1, length // RING, sizes["heads"], d), "k": k, "v": v}


def _steps(inputs: Tensors) -> list[tuple[slice, Rectangles]]:
    """(which keys, what of them) of each step: a causal square, then half of a square each, as in a zigzag ring."""
    own = inputs["q"].shape[1]
    square = Rectangles((Rectangle((0, 1), (0, own), (0, own), causal=True, offset=0),))
    half = Rectangles((Rectangle((0, 1), (0, own), (0, own // 2), causal=False, offset=0),))
    return [(slice(step * own, (step + 1) * own), half if step else square) for step in range(RING)]


def _ring(inputs: Tensors, backend: str, calls: str = AUTO) -> Outputs:
    """out [1, S, heads, d] in q's dtype, lse [1, heads, S]. `calls`: the backend of `ops.attention`."""
    q, k, v = (inputs[name] for name in "qkv")
    function = ATTENTION_INTO.find(backend, q, None).function
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full((1, q.shape[2], q.shape[1]), -torch.inf, dtype=wide, device=q.device)
    for at, rectangles in _steps(inputs):
        function(q, k[:, at], v[:, at], (out, lse), rectangles, Scoring(q.shape[3] ** -0.5, backend=calls))
    return out.to(q.dtype), lse


def _ring_backward(backend: str, calls: str = AUTO) -> Backward:
    """Gives dq, dk, dv, fp32."""

    def run(inputs: Tensors, outputs: Outputs, grads: Outputs) -> Outputs:
        q, k, v = (inputs[name] for name in "qkv")
        function = ATTENTION_INTO_BACKWARD.find(backend, q, None).function
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        saved, scoring = SavedForward(grads[0], q, *outputs), Scoring(q.shape[3] ** -0.5, backend=calls)
        for at, rectangles in _steps(inputs):
            function(saved, k[:, at], v[:, at], (dq, dk[:, at], dv[:, at]), rectangles, scoring)
        return dq, dk, dv

    return run


def _ring_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    """Keys that nobody sees are not read; gradients are fp32."""
    length, d, heads = sizes["positions"], sizes["width"], sizes["heads"]
    own = length // RING
    queries, keys = own * heads * d, (own + (RING - 1) * own // 2) * sizes["kv_heads"] * d
    flops = 4 * d * heads * RING * own * own // 2
    forward = Work(element * (2 * queries + 2 * keys), flops)
    return forward, Work(element * (3 * queries + 2 * keys) + 4 * (queries + 2 * keys), flops * 5 // 2)


RING_CASE = Case(
    op="attention_into",
    operation=ATTENTION_INTO,
    call=_ring,
    reference=lambda x: _ring(x, "calls", "reference"),
    trained=(),
    draw=_draw_ring,
    work=_ring_work,
    sizes=tuple(_attention_sizes(length) for length in (16384, 65536, 131072)),
    tiny=(_attention_sizes(128, 2, 2, 16),),
    exact=_attention_sizes(8192),
    backward=_ring_backward,
    reference_backward=_ring_backward("calls", "reference"),
    compiles=False,
)

ATTENTION_CASES = (ATTENTION_CASE, RING_CASE)
