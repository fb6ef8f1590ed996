"""Attention of blocks for the benchmark of kernels: what a ring rank computes, folded in place or merged.

A rank of a ring of RING, its steps one after the other with keys that lie ready: the sides are the backends of
`ops.attention_blocks`, so "calls" is the fastest backend of `ops.attention` with a merge of its own. Work is counted
over visible pairs: two products forward, five backward.

Letters: L tokens of the row, S = L / RING tokens of the rank, d head width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.ops.attention_blocks import (
    ATTENTION_INTO,
    ATTENTION_INTO_BACKWARD,
    Answered,
    Rectangle,
    Rectangles,
    Scoring,
)

Sizes = Mapping[str, int]
Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Work = tuple[int, int]  # bytes, FLOPs

RING = 8


def draw(sizes: Sizes, normal: Callable[..., Tensor]) -> Tensors:
    """q [1, S, heads, d], k and v [1, L, kv_heads, d]; `normal(*shape)` draws."""
    length, d = sizes["positions"], sizes["width"]
    k, v = (normal(1, length, sizes["kv_heads"], d) for _ in range(2))
    return {"q": normal(1, length // RING, sizes["heads"], d), "k": k, "v": v}


def _steps(inputs: Tensors) -> list[tuple[slice, Rectangles]]:
    """(which keys, what of them) of each step: a causal square, then half of a square each, as in a zigzag ring."""
    own = inputs["q"].shape[1]
    square = Rectangles((Rectangle((0, 1), (0, own), (0, own), causal=True, offset=0),))
    half = Rectangles((Rectangle((0, 1), (0, own), (0, own // 2), causal=False, offset=0),))
    return [(slice(step * own, (step + 1) * own), half if step else square) for step in range(RING)]


def _scoring(inputs: Tensors) -> Scoring:
    return Scoring(float(inputs["q"].shape[3] ** -0.5))


def forward(inputs: Tensors, backend: str) -> Outputs:
    """out [1, S, heads, d] in q's dtype, lse [1, heads, S] fp32."""
    q, k, v = (inputs[name] for name in "qkv")
    function, scoring = ATTENTION_INTO.find(backend, q, None).function, _scoring(inputs)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full((1, q.shape[2], q.shape[1]), -torch.inf, device=q.device)
    for at, rectangles in _steps(inputs):
        function(q, k[:, at], v[:, at], (out, lse), rectangles, scoring)
    return out.to(q.dtype), lse


def backward(backend: str) -> Callable[[Tensors, Outputs, Outputs], Outputs]:
    """(inputs, outputs, their gradients) -> dq, dk, dv, fp32."""

    def run(inputs: Tensors, outputs: Outputs, grads: Outputs) -> Outputs:
        q, k, v = (inputs[name] for name in "qkv")
        function, scoring = ATTENTION_INTO_BACKWARD.find(backend, q, None).function, _scoring(inputs)
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        answered = Answered(grads[0], q, *outputs)
        for at, rectangles in _steps(inputs):
            function(answered, k[:, at], v[:, at], (dq, dk[:, at], dv[:, at]), rectangles, scoring)
        return dq, dk, dv

    return run


def work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    """(bytes, FLOPs) of the forward and of the backward pass: every input read once, every output written once."""
    length, d, heads = sizes["positions"], sizes["width"], sizes["heads"]
    own = length // RING
    queries, keys = own * heads * d, length * sizes["kv_heads"] * d
    flops = 4 * d * heads * RING * own * own // 2
    ends = element * (2 * queries + 2 * keys), element * (3 * queries + 2 * keys) + 4 * (queries + 2 * keys)
    return (ends[0], flops), (ends[1], flops * 5 // 2)


def _sizes(positions: int, heads: int = 32, kv_heads: int = 8, width: int = 128) -> Sizes:
    return {"positions": positions, "heads": heads, "kv_heads": kv_heads, "width": width}


CASES: tuple[dict[str, Any], ...] = (
    {
        "op": "attention_into",
        "operation": ATTENTION_INTO,
        "call": forward,
        "backward": backward,
        "draw": draw,
        "work": work,
        "sizes": (_sizes(16384), _sizes(65536), _sizes(131072)),
        "tiny": (_sizes(128, 4, 2, 16),),
        "exact": _sizes(8192),
    },
)
