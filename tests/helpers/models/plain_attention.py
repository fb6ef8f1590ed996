"""Attention as plain torch computes it in a dtype, and exactly: what a kernel's error is measured against.

Letters: b rows, sq queries, sk keys, heads, kv_heads, d and dv head widths.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.ops import reference

SCALE = 0.4


def draw(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    widths: tuple[int, int],
    device: str,
    dtype: torch.dtype,
    rows: int = 2,
) -> dict[str, Tensor]:
    """q, k, v and dout of (queries, keys), (heads, kv heads) and (d, dv)."""
    (sq, sk), (num_heads, kv_heads), (d, dv) = lengths, heads, widths
    generator = torch.Generator().manual_seed(1000 * sq + sk)
    shapes = {"q": (sq, num_heads, d), "k": (sk, kv_heads, d), "v": (sk, kv_heads, dv), "dout": (sq, num_heads, dv)}
    made = {name: torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: (tensor * (48 / d) ** 0.25 / 2).to(device, dtype) for name, tensor in made.items()}


def plain(tensors: dict[str, Tensor], visible: Tensor, softcap: float | None = None) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv with matrix products in the tensors' dtype, all else in fp32 or wider; `visible` [b or 1, 1,
    sq, sk]. Backward as kernels do it, from the rounded out and log-sum-exp."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))  # kv heads -> heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys).to(wide) * SCALE
    slope = torch.ones_like(scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap).square()
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~blind, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).masked_fill(blind, 0.0).to(q.dtype), values)
    p = (scores - lse).exp().masked_fill(blind, 0.0)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)[..., None]  # [b, sq, heads] -> [b, heads, sq, 1]
    ds = (p * (torch.einsum("bqhd,bkhd->bhqk", dout, values).to(wide) - delta) * slope).to(q.dtype)
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, keys).to(wide) * SCALE
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q).to(wide) * SCALE
    dv = torch.einsum("bhqk,bqhd->bkhd", p.to(q.dtype), dout).to(wide)
    dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))  # heads -> kv heads
    lse = lse.masked_fill(blind, -torch.inf).squeeze(-1)
    return finite({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv})


def sides(tensors: dict[str, Tensor], rules: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(plain torch in the tensors' dtype, exact in fp64) of one call of `ops.attention`."""
    visible = reference.visible_keys(tensors["q"], tensors["k"], softmax_scale=SCALE, **rules)
    softcap = rules.get("softcap")
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    return plain(tensors, visible, softcap), plain(doubles, visible, softcap)


def finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the log-sum-exp of a query without keys told apart: 0 there, and 1 in "blind"."""
    lse = found["lse"].detach()
    blind = lse == -torch.inf
    return found | {"lse": lse.masked_fill(blind, 0.0), "blind": blind.to(lse.dtype)}
