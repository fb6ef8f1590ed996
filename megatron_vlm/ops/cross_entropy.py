"""Output projection and cross entropy in one, vocab-parallel and in pieces: the logits never exist whole (DESIGN D7).

Only rows that are trained are projected; the ranks of the group have the same labels and so the same rows. Each rank
holds some rows of the weight. Forward needs two numbers per token from the others, its log-sum-exp and the label's
log-probability: one max and two sum all-reduces for all pieces together. Up to `chunk_tokens` tokens keep their
log-probabilities for the backward pass, which computes the others' logits again. Twin:
`reference.linear_cross_entropy`. After Liger-Kernel's fused linear cross entropy and Megatron-LM's vocab-parallel one.

Hazards: rows past `vocab_size` are padding and take no part, or they would draw probability. The gradient of `hidden`
is this rank's share only; the caller sums it over the group (all-reduce, or reduce-scatter under sequence parallelism).
Which rows are trained is data: on a GPU the host waits for the labels once per call.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.runtime.collectives import all_reduce_

# On the CPU a larger piece costs more: the C library maps it anew each time, and the page faults take twice as long as
# the log-softmax itself (docs/benchmarks/throughput_cpu.md).
CPU_PIECE_BYTES = 2**25


@dataclass(frozen=True)
class _Shard:
    """Which vocabulary rows this rank holds: `first` .. `first + num_rows`, without padding."""

    first: int
    num_rows: int
    group: dist.ProcessGroup | None
    chunk_tokens: int

    def local_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [t] -> (row in this shard, 0 where elsewhere; whether it is here)."""
        rows = labels - self.first
        here = (rows >= 0) & (rows < self.num_rows)
        return rows.masked_fill(~here, 0), here

    @property
    def alone(self) -> bool:
        """Whether this rank holds the whole vocabulary."""
        return self.group is None or self.group.size() == 1

    def log_share(self, lse: Tensor) -> Tensor:
        """Log-sum-exp over this shard [t] -> the logarithm of the shard's probability [t]."""
        if self.alone:
            return torch.zeros_like(lse)
        assert self.group is not None
        maximum = all_reduce_(lse.clone(), self.group, dist.ReduceOp.MAX)
        return lse - maximum - all_reduce_((lse - maximum).exp(), self.group).log()

    def pieces(self, num_tokens: int, like: Tensor) -> list[slice]:
        """The token slices to work through; none where this rank holds only padding rows."""
        if self.num_rows == 0:
            return []
        size = self.chunk_tokens
        if like.device.type == "cpu":
            size = min(size, max(1, CPU_PIECE_BYTES // (self.num_rows * like.element_size())))
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


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
        chunk_tokens: tokens whose logits exist at one time, the backward pass' included.

    Returns:
        [t] fp32 (fp64 for fp64), 0 where the label is `ignore_index`; the same on every rank. Gradients: weight's is
        accumulated over pieces in that precision; hidden's is this rank's share, to be summed over the group.
    """
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], f"hidden {hidden.shape}, labels {labels.shape}"
    first = 0 if group is None else group.rank() * weight.shape[0]
    num_rows = min(max(vocab_size - first, 0), weight.shape[0])
    shard = _Shard(first, num_rows, group, chunk_tokens)
    trained = torch.nonzero(labels != ignore_index).flatten()
    if len(trained) == len(labels):
        return _valid_loss(hidden, weight, labels, vocab_size, shard)
    losses = _valid_loss(hidden[trained], weight, labels[trained], vocab_size, shard)
    return losses.new_zeros(len(labels)).index_copy(0, trained, losses)


def _valid_loss(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, shard: _Shard) -> Tensor:
    """Of trained tokens; NaN where the label is no id of the vocabulary."""
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, shard)
    return loss.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)


class _LinearCrossEntropy(torch.autograd.Function):
    """loss = -log p_label, p = softmax(z), z = hidden @ weight^T;  dz = (p - onehot(label)) * dloss.

    On one shard p = p_shard * share: its softmax over its own rows, times its probability among all shards.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows, here = shard.local_labels(labels)
        own_rows = weight[: shard.num_rows]
        lse = torch.full(labels.shape, -torch.inf, dtype=wide, device=hidden.device)
        label_logs = torch.zeros_like(lse)
        kept: dict[int, Tensor] = {}  # start of the piece -> log-probabilities on this shard [p, own rows]
        for piece in shard.pieces(len(labels), lse):
            logits = (hidden[piece] @ own_rows.T).to(wide)
            logs = logits.log_softmax(-1)
            label_logs[piece] = logs.gather(1, rows[piece, None]).squeeze(1)
            if not shard.alone:
                lse[piece] = logits.amax(-1) - logs.amax(-1)
            if piece.start >= len(labels) - shard.chunk_tokens:
                kept[piece.start] = logs
        log_share = shard.log_share(lse)
        loss = -(label_logs + log_share).masked_fill(~here, 0.0)
        if not shard.alone:
            assert shard.group is not None
            all_reduce_(loss, shard.group)
        ctx.save_for_backward(hidden, weight, labels, log_share)
        ctx.shard, ctx.kept = shard, kept
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, log_share = ctx.saved_tensors
        shard: _Shard = ctx.shard
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        rows, here = shard.local_labels(labels)
        scale = grad_loss.to(log_share.dtype)[:, None]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=log_share.dtype, device=weight.device) if wants_weight else None
        own_rows = weight[: shard.num_rows]
        for piece in reversed(shard.pieces(len(labels), log_share)):  # the kept ones first, and free
            logs = ctx.kept.pop(piece.start, None)
            if logs is None:
                logs = (hidden[piece] @ own_rows.T).to(log_share.dtype).log_softmax(-1)
            if not shard.alone:
                logs += log_share[piece, None]
            probabilities = logs.exp_().to(hidden.dtype)
            del logs
            if grad_hidden is not None:
                # Not in the product: a term of size 1 among many tiny ones costs it a digit where there are few tokens.
                of_labels = own_rows[rows[piece]] * here[piece, None]
                grad_hidden[piece] = (probabilities @ own_rows - of_labels) * scale[piece]
            if grad_weight is not None:
                grad_logits = probabilities.scatter_add_(1, rows[piece, None], -here[piece, None].to(hidden.dtype))
                _add_product(
                    grad_weight[: shard.num_rows], grad_logits.T, (hidden[piece] * scale[piece]).to(hidden.dtype)
                )
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one kernel where the dtypes are one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
