"""Output projection and cross entropy in one, vocab-parallel and in chunks: the logits never exist whole (DESIGN D7).

Each rank of the group holds some rows of the weight. Forward computes each chunk's logits on the own rows, keeps three
numbers per token (maximum, sum of exponentials, the label's logit) and needs one max and one sum all-reduce for all
chunks together; backward computes the logits again. Twin: `reference.linear_cross_entropy`. After Liger-Kernel's fused
linear cross entropy and Megatron-LM's vocab-parallel one.

Hazards: rows past `vocab_size` are padding and take no part, or they would draw probability. The gradient of `hidden`
is this rank's share only; the caller sums it over the group (all-reduce, or reduce-scatter under sequence parallelism).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.runtime.collectives import all_reduce_


@dataclass(frozen=True)
class _Shard:
    """Which vocabulary rows this rank holds: `first` .. `first + num_rows`, without padding."""

    first: int
    num_rows: int
    group: dist.ProcessGroup | None
    chunk_tokens: int
    ignore_index: int

    def local_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [t] -> (row in this shard, 0 where elsewhere; whether it is here)."""
        rows = labels - self.first
        here = (rows >= 0) & (rows < self.num_rows)
        return rows.masked_fill(~here, 0), here

    def all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """Over the ranks that share the vocabulary, in place."""
        if self.group is not None:
            all_reduce_(values, self.group, operation)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    ignore_index: int = -100,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Per-token cross entropy of hidden @ weight^T against labels.

    Args:
        hidden: [t, h], the same on every rank of the group.
        weight: [v/tp, h], this rank's rows of the padded vocabulary, in rank order.
        labels: [t], global ids or `ignore_index`; any other id outside the vocabulary gives a NaN loss.
        vocab_size: true vocabulary; later rows are padding.
        group: the ranks that share the vocabulary; None for one.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        [t] fp32 (fp64 for fp64), 0 where the label is `ignore_index`; the same on every rank. Gradients: weight's is
        accumulated over chunks in that precision; hidden's is this rank's share, to be summed over the group.
    """
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], f"hidden {hidden.shape}, labels {labels.shape}"
    first = 0 if group is None else group.rank() * weight.shape[0]
    num_rows = min(max(vocab_size - first, 0), weight.shape[0])
    shard = _Shard(first, num_rows, group, chunk_tokens, ignore_index)
    invalid = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, shard)
    return loss.masked_fill(invalid, torch.nan)


class _LinearCrossEntropy(torch.autograd.Function):
    """loss = log(sum_j exp(z_j)) - z_label, z = hidden @ weight^T;  dz = (softmax(z) - onehot(label)) * dloss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows, here = shard.local_labels(labels)
        maximum = torch.full(labels.shape, torch.finfo(wide).min, dtype=wide, device=hidden.device)
        sums = torch.zeros(2, *labels.shape, dtype=wide, device=hidden.device)  # of exponentials; the label's logit
        own_rows = weight[: shard.num_rows]
        for chunk in _chunks(len(labels), shard):
            logits = (hidden[chunk] @ own_rows.T).to(wide)  # [c, own rows]
            maximum[chunk] = logits.amax(-1)
            sums[0, chunk] = (logits - maximum[chunk, None]).exp_().sum(-1)
            label_logits = logits.gather(1, rows[chunk, None]).squeeze(1)
            sums[1, chunk] = label_logits.masked_fill(~here[chunk], 0.0)
        own_maximum = maximum.clone()
        shard.all_reduce(maximum, dist.ReduceOp.MAX)
        sums[0] *= (own_maximum - maximum).exp()
        shard.all_reduce(sums, dist.ReduceOp.SUM)
        lse = maximum + sums[0].log()
        trained = labels != shard.ignore_index
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.shard = shard
        return (lse - sums[1]).masked_fill(~trained, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        shard: _Shard = ctx.shard
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        rows, here = shard.local_labels(labels)
        scale = grad_loss.to(lse.dtype).masked_fill(labels == shard.ignore_index, 0.0)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if wants_weight else None
        own_rows = weight[: shard.num_rows]
        for chunk in _chunks(len(labels), shard):
            grad_logits = ((hidden[chunk] @ own_rows.T).to(lse.dtype) - lse[chunk, None]).exp_()  # softmax
            grad_logits.scatter_add_(1, rows[chunk, None], -here[chunk, None].to(lse.dtype))
            grad_logits = grad_logits.mul_(scale[chunk, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ own_rows
            if grad_weight is not None:
                grad_weight[: shard.num_rows] += grad_logits.T @ hidden[chunk]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(num_tokens: int, shard: _Shard) -> list[slice]:
    """The token slices to work through; none where this rank holds only padding rows."""
    if shard.num_rows == 0:
        return []
    return [slice(start, start + shard.chunk_tokens) for start in range(0, num_tokens, shard.chunk_tokens)]
