"""Output projection and cross entropy in one, vocab-parallel and in pieces: the logits never exist whole (DESIGN D7).

Only rows that are trained are projected; the ranks of the group have the same labels and so the same rows. Each rank
holds some rows of the weight. With q the target distribution of a token and z its logits, the loss is
logsumexp(z) - sum_j q_j z_j, so forward needs two numbers per token from the others, whatever the target: one max and
one sum all-reduce for all pieces together. On a CPU up to `chunk_tokens` tokens keep their log-probabilities for the
backward pass, which computes the others' logits again. Twin: `reference.linear_cross_entropy`. After Liger-Kernel's
fused linear cross entropy and Megatron-LM's vocab-parallel one.

A piece is some tokens with all of the shard's rows. On a GPU the backward pass cuts the other way: many tokens with few
rows of the weight, so that the weight's gradient, the largest tensor there is, is read and written once for every
`BACKWARD_TOKENS` and not for every piece (as Apple's cut cross entropy, Wijmans et al. 2024, goes over the vocabulary).

Of a piece one fp32 tensor [p, v/tp] is there at a time, and in narrower weights' dtype one more: `held_bytes` counts
them. With 8,192 tokens, hidden 4,096 and 131,072 words in bf16 that is 256 * 131,072 * (4 + 2) = 192 MiB, where all
logits would be 2 GiB.

Where megatron-core's DDP has given the weight an fp32 `main_grad`, the pieces' products are added to it as they come
and the weight is marked `grad_added_to_main_grad`, as megatron-core's linear layers do. Autograd gets zeros for the
weight: where it is the embedding's too, the embedding's gradient is added to them, and megatron-core's hook, which for
such a weight (`zero_out_wgrad`) does not skip what comes by autograd, adds that to `main_grad`.

Hazards: rows past `vocab_size` are padding and take no part, or they would draw probability. The gradient of `hidden`
is this rank's share only; the caller sums it over the group (all-reduce, or reduce-scatter under sequence parallelism).
Which rows are trained is data: on a GPU the host waits for the labels once per call.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.ops.labels import IGNORE
from megatron_vlm.ops.reference import LossRules, SoftTargets
from megatron_vlm.runtime.collectives import all_reduce_

# On the CPU a larger piece costs more: the C library maps it anew each time, and the page faults take twice as long as
# the log-softmax itself (docs/benchmarks/throughput_cpu.md).
CPU_PIECE_BYTES = 2**25
GPU_PIECE_BYTES = 2**27
BACKWARD_TOKENS, BACKWARD_BYTES = 4096, 2**25  # of dz on a GPU, in fp32: its L2 cache holds that
PRODUCT_BYTES = 2**25  # of a gradient in fp32, before it is added: as well


def piece_tokens(num_rows: int, chunk_tokens: int, on_cpu: bool, wide_bytes: int = 4) -> int:
    """Tokens whose logits are made at a time, at most, on a rank that holds `num_rows` rows of the vocabulary."""
    piece_bytes = CPU_PIECE_BYTES if on_cpu else GPU_PIECE_BYTES
    return min(chunk_tokens, max(1, piece_bytes // (num_rows * wide_bytes)))


def held_bytes(
    num_tokens: int, num_rows: int, hidden_size: int, *, chunk_tokens: int, element_bytes: int, on_cpu: bool
) -> int:
    """The most that the operation holds at a time, forward or backward, besides inputs and gradients.

    Left out: vectors of a number per token, on a CPU what is [p, h], and what a soft-cap and soft targets add.

    Args:
        num_tokens: trained ones, at least one.
        num_rows: v/tp, of the weight on this rank.
        hidden_size: h.
        chunk_tokens: as given to `linear_cross_entropy`.
        element_bytes: of an element of hidden and weight, 2 or 4; the log-probabilities have 4.
        on_cpu: else on a GPU.
    """
    piece = min(num_tokens, piece_tokens(num_rows, chunk_tokens, on_cpu))
    narrow = element_bytes if element_bytes < 4 else 0  # of logits, and later of their gradient
    if on_cpu:
        kept = num_tokens - -(-max(0, num_tokens - chunk_tokens) // piece) * piece  # whole pieces are dropped
        return narrow * piece * num_rows + 4 * max(kept, piece) * num_rows
    tokens = min(num_tokens, BACKWARD_TOKENS)
    rows = min(num_rows, _backward_rows(tokens, 4))
    dz, product = tokens * rows, min(PRODUCT_BYTES, 4 * max(tokens, rows) * hidden_size) if narrow else 0
    backward = (4 + element_bytes) * tokens * hidden_size + narrow * dz + max(4 * dz, product)
    return max((4 + narrow) * piece * num_rows, backward)


def _backward_rows(num_tokens: int, wide_bytes: int) -> int:
    return max(1, BACKWARD_BYTES // (num_tokens * wide_bytes))


@dataclass(frozen=True)
class _Shard:
    """Vocabulary rows of this rank: `first` .. `first + num_rows`, without padding."""

    first: int
    num_rows: int
    vocab_size: int
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

    def combine(self, lse: Tensor, target_logs: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Combines the results of all shards.

        Args:
            lse: [t], log-sum-exp over this shard.
            target_logs: [t], sum of q_j log p_j over this shard, p the softmax within it.
            mass: [t], sum of q_j over this shard.

        Returns:
            Cross entropy, log-sum-exp, and the logarithm of this shard's probability; each [t], the first two the same
            on every rank.
        """
        if self.alone:
            return -target_logs, lse, torch.zeros_like(lse)
        assert self.group is not None
        maximum = all_reduce_(lse.clone(), self.group, dist.ReduceOp.MAX)
        offset = lse - maximum  # -inf where this rank holds only padding rows
        of_targets = (target_logs + mass * offset).masked_fill(mass == 0, 0.0)
        total, target = all_reduce_(torch.stack([offset.exp(), of_targets]), self.group)  # [2, t]
        log_total = total.log()
        return log_total - target, maximum + log_total, offset - log_total

    def pieces(self, num_tokens: int, like: Tensor) -> list[slice]:
        """The token slices to work through; none where this rank holds only padding rows."""
        if self.num_rows == 0:
            return []
        size = piece_tokens(self.num_rows, self.chunk_tokens, _on_cpu(like), like.element_size())
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]

    def blocks(self, num_tokens: int, like: Tensor) -> Iterator[tuple[slice, "_Shard"]]:
        """Rows of the weight whose dz of so many tokens is made at a time on a GPU, also as a shard of their own."""
        size = _backward_rows(num_tokens, like.element_size())
        for start in range(0, self.num_rows, size):
            rows = slice(start, min(start + size, self.num_rows))
            yield rows, replace(self, first=self.first + start, num_rows=rows.stop - start)

    def keeps(self, piece: slice, num_tokens: int, like: Tensor) -> bool:
        """Whether a piece's log-probabilities stay for the backward pass: those at the end, which it begins with."""
        return _on_cpu(like) and piece.start >= num_tokens - self.chunk_tokens


@dataclass(frozen=True)
class _Rules:
    """LossRules with their defaults."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float | None = None
    soft_targets: SoftTargets | None = None


class _Targets:
    """The target distributions q of all tokens, as far as they lie in this shard: `uniform` at every row, `weights` [t]
    more at row `rows` [t], and what `band_weights` says more at the rows `band`."""

    def __init__(self, labels: Tensor, shard: _Shard, rules: _Rules, dtype: torch.dtype) -> None:
        self.labels, self.shard, self.soft, self.dtype = labels, shard, rules.soft_targets, dtype
        self.sharp = 1.0 - rules.label_smoothing
        self.uniform = rules.label_smoothing / shard.vocab_size
        self.rows, here = shard.local_labels(labels)
        self.band = slice(0, 0)
        if self.soft is not None:
            here = here & ~self._is_soft(labels, self.soft)
            first = min(max(self.soft.first - shard.first, 0), shard.num_rows)
            self.band = slice(first, max(first, min(self.soft.first + self.soft.count - shard.first, shard.num_rows)))
        self.weights = here.to(dtype) * self.sharp

    @staticmethod
    def _is_soft(labels: Tensor, soft: SoftTargets) -> Tensor:
        return (labels >= soft.first) & (labels < soft.first + soft.count)

    def band_weights(self, piece: slice) -> Tensor:
        """[p, band]; the whole band of all shards sums to `sharp` where the label is soft, to 0 elsewhere."""
        assert self.soft is not None
        labels = self.labels[piece, None]
        ids = torch.arange(self.soft.first, self.soft.first + self.soft.count, device=labels.device)
        closeness = ((labels - ids).to(self.dtype) / self.soft.std).square().mul_(-0.5).softmax(-1)
        own = slice(self.shard.first + self.band.start - self.soft.first, None)
        own_closeness = closeness[:, own][:, : self.band.stop - self.band.start]
        return own_closeness * self._is_soft(labels, self.soft) * self.sharp

    def dot(self, piece: slice, logs: Tensor) -> Tensor:
        """logs [p, own rows] -> sum of q_j logs_j [p]."""
        found = logs.gather(1, self.rows[piece, None]).squeeze(1) * self.weights[piece]
        if self.uniform:
            found += self.uniform * logs.sum(-1)
        if self.soft is not None:
            found += (self.band_weights(piece) * logs[:, self.band]).sum(-1)
        return found

    def mass(self) -> Tensor:
        """Sum of q_j over this shard [t]."""
        mass = self.weights + self.uniform * self.shard.num_rows
        if self.soft is not None and self.shard.num_rows:
            for piece in self.shard.pieces(len(self.labels), self.weights):
                mass[piece] += self.band_weights(piece).sum(-1)
        return mass


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    ignore_index: int = IGNORE,
    chunk_tokens: int = 1024,
    **rules: Unpack[LossRules],
) -> Tensor:
    """Per-token cross entropy of hidden @ weight^T against labels.

    Args:
        hidden: [t, h], the same on every rank of the group.
        weight: [v/tp, h], this rank's rows of the padded vocabulary, in rank order.
        labels: [t], global ids or `ignore_index`; any other id outside the vocabulary gives a NaN loss.
        vocab_size: true vocabulary; later rows are padding.
        group: the ranks that share the vocabulary; None for one.
        chunk_tokens: tokens whose logits exist at one time, at most; on a CPU those kept for the backward pass
            included, on a GPU, where that takes few rows of the weight at a time, forward alone.
        rules: z-loss, label smoothing, soft-cap, soft targets; without them the plain cross entropy.

    Returns:
        [t] fp32 (fp64 for fp64), 0 where the label is `ignore_index`; the same on every rank. Gradients: weight's is
        accumulated over pieces in that precision, in `weight.main_grad` where that is of it; hidden's is this rank's
        share, to be summed over the group.
    """
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], f"hidden {hidden.shape}, labels {labels.shape}"
    chosen = _Rules(**rules)
    soft = chosen.soft_targets
    assert soft is None or 0 <= soft.first <= soft.first + soft.count <= vocab_size, f"{soft}, vocabulary {vocab_size}"
    first = 0 if group is None else group.rank() * weight.shape[0]
    num_rows = min(max(vocab_size - first, 0), weight.shape[0])
    shard = _Shard(first, num_rows, vocab_size, group, chunk_tokens)
    trained = torch.nonzero(labels != ignore_index).flatten()
    if len(trained) == len(labels):
        return _valid_loss(hidden, weight, labels, shard, chosen)
    losses = _valid_loss(hidden[trained], weight, labels[trained], shard, chosen)
    return losses.new_zeros(len(labels)).index_copy(0, trained, losses)


def _valid_loss(hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard, rules: _Rules) -> Tensor:
    """Loss of trained tokens; NaN, as the gradients are, where the label is no id of the vocabulary: an update by the
    rest would hide it."""
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, shard, rules)
    return loss * torch.ones_like(loss).masked_fill((labels < 0) | (labels >= shard.vocab_size), torch.nan)


class _LinearCrossEntropy(torch.autograd.Function):
    """loss = -sum q log p + z_loss * lse^2, p = softmax(z), z = hidden @ weight^T, or softcap * tanh of it / softcap.

    dz = (p * (1 + 2 * z_loss * lse) - q) * dloss, times the soft-cap's slope 1 - (z / softcap)^2. On one shard
    p = p_shard * share: its softmax over its own rows, times its probability among all shards.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard, rules: _Rules) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        targets = _Targets(labels, shard, rules, wide)
        needs_lse = not (shard.alone and _on_cpu(hidden)) or rules.z_loss != 0.0 or rules.softcap is not None
        own_rows = weight[: shard.num_rows]
        lse = torch.full(labels.shape, -torch.inf, dtype=wide, device=hidden.device)
        target_logs = torch.zeros_like(lse)
        kept: dict[int, Tensor] = {}  # start of the piece -> log-probabilities on this shard [p, own rows]
        for piece in shard.pieces(len(labels), lse):
            logits = _logits(hidden[piece], own_rows, wide, rules.softcap)
            if needs_lse:
                lse[piece] = logits.amax(-1)
            logs = _log_softmax_(logits)
            target_logs[piece] = targets.dot(piece, logs)
            if needs_lse:
                lse[piece] -= logs.amax(-1)
            if shard.keeps(piece, len(labels), lse):
                kept[piece.start] = logs
            del logits, logs  # before the next piece's are made
        loss, lse, log_share = shard.combine(lse, target_logs, targets.mass())
        if rules.z_loss:
            loss = loss + rules.z_loss * lse.square()
        ctx.save_for_backward(hidden, weight, lse, log_share)
        ctx.shard, ctx.rules, ctx.targets, ctx.kept = shard, rules, targets, kept
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, lse, _ = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        scale = grad_loss.to(lse.dtype)[:, None]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight, main_grad = None, _main_grad(weight, lse.dtype)
        if wants_weight:
            grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if main_grad is None else main_grad
        by_parts = _backward_by_pieces if _on_cpu(lse) else _backward_by_blocks
        by_parts(ctx, scale, grad_hidden, grad_weight)
        if grad_weight is None or main_grad is None:
            return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
        weight.grad_added_to_main_grad = True
        return grad_hidden, weight.new_zeros(()).expand(weight.shape), None, None, None


def _backward_by_pieces(ctx: Any, scale: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
    """Fills in `grad_hidden` and adds to `grad_weight`, some tokens at a time; the kept ones first, and free."""
    hidden, weight, lse, log_share = ctx.saved_tensors
    shard: _Shard = ctx.shard
    targets: _Targets = ctx.targets
    softcap = ctx.rules.softcap
    own_rows = weight[: shard.num_rows]
    for piece in reversed(shard.pieces(len(lse), lse)):
        logs = ctx.kept.pop(piece.start, None)
        if logs is None:
            logs = _log_softmax_(_logits(hidden[piece], own_rows, lse.dtype, softcap))
        if not shard.alone:
            logs += log_share[piece, None]
        slope = None if softcap is None else _slope(logs, lse[piece, None], softcap)
        of_all = _of_all_rows(logs, slope, lse[piece, None], ctx.rules, targets.uniform)
        of_labels, of_band = _of_targets(targets, piece, slope)
        if grad_hidden is not None and hidden.dtype == lse.dtype:
            # Not in the product: a term of size 1 among many tiny ones costs it a digit where there are few tokens.
            of_targets = own_rows[targets.rows[piece]] * of_labels
            if of_band is not None:
                of_targets = of_targets + of_band @ own_rows[targets.band]
            grad_hidden[piece] = (of_all @ own_rows - of_targets) * scale[piece]
        dz = _less_targets_(of_all, targets.rows[piece, None], of_labels, targets.band, of_band).to(hidden.dtype)
        del logs, of_all, slope  # dz may be as large; and before the next piece's logits are made
        if grad_hidden is not None and hidden.dtype != lse.dtype:
            grad_hidden[piece] = (dz @ own_rows) * scale[piece]
        if grad_weight is not None:
            _add_product(grad_weight[: shard.num_rows], dz.T, (hidden[piece] * scale[piece]).to(hidden.dtype))
        del dz


def _backward_by_blocks(ctx: Any, scale: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
    """Same as `_backward_by_pieces`, many tokens at a time and few rows of the weight."""
    hidden, weight, lse, _ = ctx.saved_tensors
    softcap = ctx.rules.softcap
    for start in range(0, len(lse), BACKWARD_TOKENS):
        piece = slice(start, start + BACKWARD_TOKENS)
        states, lse_column = hidden[piece], lse[piece, None]
        scaled = (states * scale[piece]).to(hidden.dtype)
        total = torch.zeros(states.shape, dtype=lse.dtype, device=lse.device)
        for rows, block in ctx.shard.blocks(len(states), lse):
            targets = _Targets(ctx.targets.labels, block, ctx.rules, lse.dtype)
            logs = _logits(states, weight[rows], lse.dtype, softcap).sub_(lse_column)
            slope = None if softcap is None else _slope(logs, lse_column, softcap)
            of_all = _of_all_rows(logs, slope, lse_column, ctx.rules, targets.uniform)
            of_labels, of_band = _of_targets(targets, piece, slope)
            dz = _less_targets_(of_all, targets.rows[piece, None], of_labels, targets.band, of_band).to(hidden.dtype)
            del logs, of_all
            if grad_hidden is not None:
                _add_product(total, dz, weight[rows])
            if grad_weight is not None:
                _add_product(grad_weight[rows], dz.T, scaled)
            del dz, slope
        if grad_hidden is not None:
            grad_hidden[piece] = total.mul_(scale[piece])
        del total, scaled  # before the next tokens' are made


def _on_cpu(like: Tensor) -> bool:
    return like.is_cpu


def _less_targets_(of_all: Tensor, rows: Tensor, of_labels: Tensor, band: slice, of_band: Tensor | None) -> Tensor:
    """dz, in place of what every row has of it: [p, rows of the weight]."""
    of_all.scatter_add_(1, rows, -of_labels.to(of_all.dtype))
    if of_band is not None:
        of_all[:, band] -= of_band
    return of_all


def _logits(hidden: Tensor, own_rows: Tensor, wide: torch.dtype, softcap: float | None) -> Tensor:
    """hidden [p, h] -> z [p, own rows]."""
    logits = (hidden @ own_rows.T).to(wide)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _log_softmax_(logits: Tensor) -> Tensor:
    """Log-softmax in place, [p, own rows]: torch's kernels write an element after its row is read (tested)."""
    return torch.log_softmax(logits, -1, out=logits)


def _slope(logs: Tensor, lse: Tensor, softcap: float) -> Tensor:
    """dz by the logits before the soft-cap, from log p [p, own rows] and logsumexp(z) [p, 1]."""
    return (logs + lse).div_(softcap).square_().neg_().add_(1.0)


def _of_all_rows(logs: Tensor, slope: Tensor | None, lse: Tensor, rules: _Rules, uniform: float) -> Tensor:
    """The part of dz that every row of the shard has: log p [p, own rows], which is used up -> [p, own rows]."""
    found = logs.exp_()
    if rules.z_loss:
        found *= 1.0 + 2.0 * rules.z_loss * lse
    if uniform:
        found -= uniform
    return found if slope is None else found.mul_(slope)


def _of_targets(targets: _Targets, piece: slice, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The parts to subtract from dz at the labels' rows [p, 1] and at the soft targets' [p, band]; None without any."""
    of_labels = targets.weights[piece, None]
    of_band = None if targets.soft is None else targets.band_weights(piece)
    if slope is not None:
        of_labels = of_labels * slope.gather(1, targets.rows[piece, None])
        of_band = None if of_band is None else of_band * slope[:, targets.band]
    return of_labels, of_band


def _main_grad(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """megatron-core's gradient buffer of a parameter, where it accumulates in `dtype`."""
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == dtype else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [v, h] += left [v, p] @ right [p, h], the product in total's dtype: rounded to bf16 for every piece, it
    would cost the sum its digits."""
    if left.device.type == "cpu":  # has no product of bf16 tensors in fp32
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
        return
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    block = max(1, PRODUCT_BYTES // (right.shape[1] * total.element_size()))
    for start in range(0, len(total), block):
        rows = slice(start, start + block)
        total[rows] += torch.mm(left[rows], right, out_dtype=total.dtype)
