"""Plain-torch twins of the operations: short, obviously right, slow and memory hungry.

They are what every backend is tested against, and the `reference` backend where one can be chosen. Nothing here knows
of ranks, chunks or kernels. Letters: b rows, s positions (q: of queries, k: of keys), d head width, t tokens, h hidden,
v vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside (Zhang and Sennrich 2019)."""
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE (Su et al. 2021, in Hugging Face's order of pairs: i with i + d/2).

    Args:
        x: [b, s, heads, d].
        cos, sin: [b, s, d/2], fp32.

    Returns:
        [b, s, heads, d] in x's dtype.
    """
    cos, sin = (torch.cat([table, table], dim=-1)[:, :, None, :] for table in (cos, sin))  # [b, s, 1, d]
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def visible_keys(q: Tensor, k: Tensor, causal: bool, key_valid: Tensor | None) -> Tensor:
    """Which keys each query may see, [b or 1, 1, sq, sk] bool.

    Causal is aligned at the end: the last query sees all keys, as where queries follow cached keys.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(num_keys - num_queries)
    visible = visible[None, None]
    return visible if key_valid is None else visible & key_valid[:, None, None, :]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float, key_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped queries; see `ops.attention.attention` for shapes and meaning."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))  # kv heads -> heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * softmax_scale
    visible = visible_keys(q, k, causal, key_valid)
    blind = ~visible.any(-1, keepdim=True)  # a query without any key: zero output, and no NaN on the way
    scores = scores.masked_fill(~visible & ~blind, -torch.inf)
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    probabilities = scores.softmax(-1).masked_fill(blind, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, values)
    return out.to(q.dtype), lse.detach()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, ignore_index: int = -100
) -> Tensor:
    """Per-token cross entropy of hidden @ weight^T over the first `vocab_size` rows of the whole weight.

    Args:
        hidden: [t, h]. weight: [v, h], v >= vocab_size. labels: [t].

    Returns:
        [t] fp32, 0 where the label is `ignore_index`.
    """
    logits = (hidden @ weight[:vocab_size].T).to(torch.promote_types(hidden.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
