"""Plain-torch twins of the operations: short, obviously right, slow and memory hungry.

They are what every backend is tested against, and the `reference` backend where one can be chosen. Nothing here knows
of ranks, chunks or kernels. Letters: b rows, s positions (q: of queries, k: of keys), d head width, t tokens, h hidden,
v vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vlm.ops.labels import IGNORE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside (Zhang and Sennrich 2019)."""
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), each in x's dtype; without a residual x itself."""
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps), total


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """a(gate) * up of [..., 2f], the gate in front, in fp32 inside -> [..., f] (Shazeer 2020)."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)


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


class AttentionRules(TypedDict, total=False):
    """The keywords of attention and its backward. Query i stands at key index i + offset; the default None is "off".

    Args:
        causal: query i sees key j only where j <= i + offset.
        softmax_scale: factor of the scores.
        offset: any integer; default sk - sq: the last query stands at the last key (queries follow cached keys).
        window: query i sees key j only where i + offset - j < window.
        softcap: the scaled scores become softcap * tanh(scores / softcap).
        key_valid: [b, sk] bool; False hides a key from every query of its row (left padding).
    """

    causal: Required[bool]
    softmax_scale: Required[float]
    offset: int | None
    window: int | None
    softcap: float | None
    key_valid: Tensor | None


def offset_of(q: Tensor, k: Tensor, rules: AttentionRules) -> int:
    """The key index at which query 0 stands."""
    offset = rules.get("offset")
    return k.shape[1] - q.shape[1] if offset is None else offset


def visible_keys(q: Tensor, k: Tensor, **rules: Unpack[AttentionRules]) -> Tensor:
    """Visibility of each key for each query, [b or 1, 1, sq, sk] bool."""
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    window, key_valid = rules.get("window"), rules.get("key_valid")
    if rules["causal"]:
        visible = visible.tril(offset_of(q, k, rules))
    if window is not None:
        visible = visible.triu(offset_of(q, k, rules) - window + 1)
    visible = visible[None, None]
    return visible if key_valid is None else visible & key_valid[:, None, None, :]


def _scores(q: Tensor, keys: Tensor, rules: AttentionRules) -> Tensor:
    """Scaled and soft-capped, before anything is hidden: [b, heads, sq, sk]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * rules["softmax_scale"]
    softcap = rules.get("softcap")
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attention(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped queries; see `ops.attention.attention` for shapes and meaning."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))  # kv heads -> heads
    scores = _scores(q.to(wide), keys, rules)
    visible = visible_keys(q, k, **rules)
    blind = ~visible.any(-1, keepdim=True)  # a query without any key: zero output, and no NaN on the way
    scores = scores.masked_fill(~visible & ~blind, -torch.inf)
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    probabilities = scores.softmax(-1).masked_fill(blind, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, values)
    return out.to(q.dtype), lse.detach()


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **rules: Unpack[AttentionRules]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block from the final out and lse; see `ops.attention.attention_backward`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[2]
    dout, q, k, v, out = (x.to(wide) for x in (dout, q, k, v, out))
    keys, values = (x.repeat_interleave(q.shape[2] // kv_heads, dim=2) for x in (k, v))  # kv heads -> heads
    scores = _scores(q, keys, rules)
    probabilities = (scores - lse[..., None]).exp().masked_fill(~visible_keys(q, k, **rules), 0.0)
    delta = (dout * out).sum(-1).transpose(1, 2)[..., None]  # [b, sq, heads] -> [b, heads, sq, 1]
    dscores = probabilities * (torch.einsum("bqhd,bkhd->bhqk", dout, values) - delta) * rules["softmax_scale"]
    softcap = rules.get("softcap")
    if softcap is not None:
        dscores = dscores * (1 - (scores / softcap).square())  # the slope of tanh
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, keys)
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
    dv = torch.einsum("bhqk,bqhd->bkhd", probabilities, dout)
    dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))  # heads -> kv heads
    return dq, dk, dv


@dataclass(frozen=True)
class SoftTargets:
    """Labels that are points on a line: ids `first` .. `first + count - 1`, as the time tokens of LITA and VILA.

    The target of such a label is no single id but a distribution over all of these, w_j ~ exp(-(label - j)^2 / 2 std^2)
    (VILA's soft cross entropy; Huang et al. 2024).
    """

    first: int
    count: int
    std: float


class LossRules(TypedDict, total=False):
    """The keywords of linear cross entropy beyond the plain one. z: a token's logits, over the true vocabulary.

    Args:
        z_loss: this much of logsumexp(z)^2 is added, which keeps logits from drifting off (Chowdhery et al. 2022).
        label_smoothing: this share of the target is spread evenly over the vocabulary (Szegedy et al. 2016).
        softcap: z becomes softcap * tanh(z / softcap) before anything else (Gemma 2).
        soft_targets: labels whose target is a distribution.
    """

    z_loss: float
    label_smoothing: float
    softcap: float | None
    soft_targets: SoftTargets | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = IGNORE,
    **rules: Unpack[LossRules],
) -> Tensor:
    """Per-token cross entropy of hidden @ weight^T over the first `vocab_size` rows of the whole weight.

    Args:
        hidden: [t, h]. weight: [v, h], v >= vocab_size. labels: [t].

    Returns:
        [t] fp32, 0 where the label is `ignore_index`.
    """
    logits = (hidden @ weight[:vocab_size].T).to(torch.promote_types(hidden.dtype, torch.float32))
    softcap, soft = rules.get("softcap"), rules.get("soft_targets")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    smoothing = rules.get("label_smoothing", 0.0)
    losses = functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )
    for token, label in enumerate(labels.tolist()):
        if soft is not None and soft.first <= label < soft.first + soft.count:
            ids = torch.arange(soft.first, soft.first + soft.count, device=logits.device)
            closeness = torch.exp(-((label - ids).to(logits.dtype) ** 2) / (2 * soft.std**2))
            target = torch.zeros_like(logits[token]).index_copy(0, ids, closeness / closeness.sum())
            loss = functional.cross_entropy(logits[token], target, label_smoothing=smoothing)
            losses = losses.index_put((torch.tensor(token, device=losses.device),), loss)
    squares = logits.logsumexp(-1).square().masked_fill(labels == ignore_index, 0.0)
    return losses + rules.get("z_loss", 0.0) * squares
