"""Ring attention: each ring rank's queries with the keys of all (DESIGN D6), by blocks merged in fp32.

Mode `p2p`: at step s rank r computes with keys of rank r-s, while the keys of the next step are on their way; in the
backward pass their gradients go home meanwhile. Keys go from owner to reader directly, and not from neighbour to
neighbour: so a reader gets the keys it reads and no others, gradients have one way home instead of the rest of the
ring, and a document or a window that ends nearby costs nothing far away. Mode `all_gather`: keys of all ranks at once,
one call per query chunk and document, nothing to merge; memory grows with L. Both carry kv heads only.

Merging (out, lse) of disjoint keys: out += sigmoid(lse_b - lse) * (out_b - out), lse = logaddexp(lse, lse_b), as in
ring-flash-attention (Zhu), whose older log(1 + exp()) overflowed. The backward pass takes every block's gradients from
the final out and lse (FlashAttention, Dao et al. 2022) and merges nothing. Sums are kept, and gradients sent, in fp32:
in bf16 the error grows with the ring.

Hazards. The ring has a group of its own, on which nothing else is in flight. Over NCCL that group must have run one
collective before: a rank that needs no keys takes no part in a step, which only a group already connected allows.

Letters: b rows; L length; R ring; S = L/R; heads and kv_heads of this (tensor and Ulysses) rank; d, dv head widths.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vlm.ops.attention import attention, attention_backward
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.ops.reference import AttentionRules
from megatron_vlm.parallel.ring_plan import Call, RingPlan, Share
from megatron_vlm.parallel.ulysses import uniform_groups

RingMode = Literal["p2p", "all_gather"]


@dataclass(frozen=True)
class Ring:
    """Who computes what, and over which group.

    Args:
        plan: layout, documents and visibility; equal on all ranks of the group.
        group: group rank = ring rank; None for a ring of one.
        mode: p2p | all_gather.
    """

    plan: RingPlan
    group: ProcessGroup | None = None
    mode: RingMode = "p2p"

    def __post_init__(self) -> None:
        size = 1 if self.group is None else self.group.size()
        assert size == self.plan.layout.ring, f"a group of {size} ranks for a ring of {self.plan.layout.ring}"

    @property
    def gathers(self) -> bool:
        """Whether all keys are gathered at once."""
        return self.mode == "all_gather" and self.plan.layout.ring > 1

    @property
    def rank(self) -> int:
        """This ring rank."""
        return 0 if self.group is None else self.group.rank()


class Scoring(TypedDict, total=False):
    """Keywords of `ops.attention` that do not concern who sees whom."""

    softmax_scale: Required[float]
    softcap: float | None
    backend: str


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    *,
    kv_index: Sequence[int],
    **scoring: Unpack[Scoring],
) -> Tensor:
    """Attention of this ring rank's queries over whole rows, differentiable. All ranks of the ring call it.

    Args:
        q: [b, S, heads, d], positions in the layout's order of a ring rank. heads may be 0, on all ranks of the ring.
        k, v: [b, S, kv_heads, d] and [b, S, kv_heads, dv].
        kv_index: [heads] kv head of each query head, ascending.
        scoring: softmax_scale, and optionally softcap and backend, as in `ops.attention`.

    Returns:
        [b, S, heads, dv] in q's dtype.
    """
    rows, length = len(ring.plan.documents), ring.plan.layout.length // ring.plan.layout.ring
    assert q.shape[:2] == k.shape[:2] == v.shape[:2] == (rows, length), (q.shape, k.shape, v.shape, rows, length)
    scores = _Scores(tuple(uniform_groups(kv_index)), **scoring)
    return _RingAttention.apply(q, k, v, ring, scores)


@dataclass(frozen=True)
class _Scores:
    """How calls are computed, in runs of (query heads, kv heads) where every kv head has equally many queries."""

    runs: tuple[tuple[slice, slice], ...]
    softmax_scale: float
    softcap: float | None = None
    backend: str = AUTO

    def rules(self, call: Call) -> AttentionRules:
        """The keywords of `ops.attention`."""
        return {
            "causal": call.causal,
            "window": call.window,
            "offset": call.offset,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }


@dataclass(frozen=True)
class _Held:
    """A share's keys and values, or their gradients: [rows, num_keys, kv_heads, d or dv]."""

    share: Share
    k: Tensor
    v: Tensor


class _RingAttention(torch.autograd.Function):
    """Forward merges blocks; backward sums the blocks' gradients and sends those of other ranks' keys home."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, scores: _Scores) -> Tensor:
        rows, length, heads, _ = q.shape
        out = torch.zeros(rows, length, heads, v.shape[3], dtype=_wide(q), device=q.device)
        lse = torch.full((rows, heads, length), -torch.inf, dtype=_wide(q), device=q.device)
        for step in _steps(k, v, ring):
            for held in step:
                _attend(q, held, out, lse, scores)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scores = ring, scores
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.zeros_like(q, dtype=_wide(q))
        home = (_GatheredGradients if ctx.ring.gathers else _TravellingGradients)(k, v, ctx.ring)
        for number, step in enumerate(_steps(k, v, ctx.ring)):
            for held, sums in zip(step, home.sums(number), strict=True):
                _attend_backward(held, (gradients[0], q, out, lse), dq, sums, ctx.scores)
            home.send(number)
        dk, dv = home.total()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums are kept."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _calls(share: Share, scores: _Scores) -> Iterator[tuple[Call, tuple[slice, slice], tuple[slice, slice]]]:
    """(call, (queries, keys), (query heads, kv heads)) of every attention call of a share."""
    for call in share.calls:
        tokens = slice(call.queries.start, call.queries.stop), slice(call.keys.start, call.keys.stop)
        for heads in scores.runs:
            yield call, tokens, heads


def _attend(q: Tensor, held: _Held, out: Tensor, lse: Tensor, scores: _Scores) -> None:
    """Merges attention of q [b, S, heads, d] with a share's keys into out [b, S, heads, dv] and lse [b, heads, S]."""
    rows = held.share.rows
    for call, (queries, keys), (heads, kv_heads) in _calls(held.share, scores):
        k, v = held.k[:, keys, kv_heads], held.v[:, keys, kv_heads]
        block = attention(q[rows, queries, heads], k, v, backend=scores.backend, **scores.rules(call))
        _merge(out[rows, queries, heads], lse[rows, heads, queries], *block)


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Adds a block in place: out, block_out [b, s, heads, dv]; lse, -inf at first, block_lse, finite [b, heads, s]."""
    weight = torch.sigmoid(block_lse - lse)  # of the block
    out.lerp_(block_out.to(out.dtype), weight.transpose(1, 2)[..., None])  # [b, heads, s] -> [b, s, heads, 1]
    lse.copy_(torch.logaddexp(lse, block_lse))


def _attend_backward(
    held: _Held, of_queries: tuple[Tensor, Tensor, Tensor, Tensor], dq: Tensor, sums: _Held, scores: _Scores
) -> None:
    """Adds a share's gradients to dq [b, S, heads, d] and to `sums`, its keys'; `of_queries`: (dout, q, out, lse)."""
    dout, q, out, lse = of_queries
    rows = held.share.rows
    for call, (queries, keys), (heads, kv_heads) in _calls(held.share, scores):
        block_dout, block_q, block_out = (x[rows, queries, heads] for x in (dout, q, out))
        k, v = held.k[:, keys, kv_heads], held.v[:, keys, kv_heads]
        block_lse, options = lse[rows, heads, queries], scores.rules(call)
        block = attention_backward(block_dout, block_q, k, v, block_out, block_lse, backend=scores.backend, **options)
        for total, part in zip(
            (dq[rows, queries, heads], sums.k[:, keys, kv_heads], sums.v[:, keys, kv_heads]), block, strict=True
        ):
            total += part


def _steps(k: Tensor, v: Tensor, ring: Ring) -> Iterator[list[_Held]]:
    """The keys and values of each step, to be used before the next is asked for."""
    return _gathered_keys(k, v, ring) if ring.gathers else _travelling_keys(k, v, ring)


def _travelling_keys(k: Tensor, v: Tensor, ring: Ring) -> Iterator[list[_Held]]:
    """Mode p2p: the next step's are under way while a step's are used."""
    size = ring.plan.layout.ring
    under_way: _Transfer | None = None
    for step in range(size):
        used = under_way
        under_way = _fetch(k, v, ring, step + 1) if step + 1 < size else None
        shares = ring.plan.shares(ring.rank, step)
        if used is None:
            yield [_Held(share, k[share.rows], v[share.rows]) for share in shares]
        else:
            yield _views(used.wait(), shares, k, v)


def _fetch(k: Tensor, v: Tensor, ring: Ring, step: int) -> "_Transfer":
    """Starts to send this rank's keys to their reader of the step, and to receive those it reads itself."""
    size = ring.plan.layout.ring
    reader, owner = (ring.rank + step) % size, (ring.rank - step) % size
    sent, received = ring.plan.shares(reader, step), ring.plan.shares(ring.rank, step)
    outgoing = k.new_empty(_num_elements(sent, k, v))
    for held in _views(outgoing, sent, k, v):
        for at_home, away in _places(held.share):
            held.k[:, away], held.v[:, away] = k[held.share.rows, at_home], v[held.share.rows, at_home]
    return _Transfer(outgoing, reader, _num_elements(received, k, v), owner, ring.group)


class _TravellingGradients:
    """Mode p2p: gradients of a step's keys go to their owner while the next step is computed."""

    def __init__(self, k: Tensor, v: Tensor, ring: Ring) -> None:
        self.ring = ring
        self.dk, self.dv = torch.zeros_like(k, dtype=_wide(k)), torch.zeros_like(v, dtype=_wide(v))
        self.outgoing = self.dk.new_empty(0)
        self.under_way: tuple[tuple[Share, ...], _Transfer] | None = None

    def sums(self, step: int) -> list[_Held]:
        """Where the gradients of a step's keys are summed."""
        shares = self.ring.plan.shares(self.ring.rank, step)
        if step == 0:
            return [_Held(share, self.dk[share.rows], self.dv[share.rows]) for share in shares]
        self.outgoing = self.dk.new_zeros(_num_elements(shares, self.dk, self.dv))
        return _views(self.outgoing, shares, self.dk, self.dv)

    def send(self, step: int) -> None:
        """Sends a step's sums to the owner, and takes in what the step before brought."""
        if step == 0:
            return
        size = self.ring.plan.layout.ring
        reader, owner = (self.ring.rank + step) % size, (self.ring.rank - step) % size
        shares = self.ring.plan.shares(reader, step)
        before = self.under_way
        num_incoming = _num_elements(shares, self.dk, self.dv)
        self.under_way = shares, _Transfer(self.outgoing, owner, num_incoming, reader, self.ring.group)
        self._take_in(before)

    def total(self) -> tuple[Tensor, Tensor]:
        """(dk [b, S, kv_heads, d], dv [b, S, kv_heads, dv]) from all readers, wide."""
        self._take_in(self.under_way)
        return self.dk, self.dv

    def _take_in(self, under_way: "tuple[tuple[Share, ...], _Transfer] | None") -> None:
        if under_way is None:
            return
        shares, transfer = under_way
        for held in _views(transfer.wait(), shares, self.dk, self.dv):
            for at_home, away in _places(held.share):
                self.dk[held.share.rows, at_home] += held.k[:, away]
                self.dv[held.share.rows, at_home] += held.v[:, away]


class _Transfer:
    """One flat message out and one in, under way. Empty ones are not sent: sender and receiver know their size.

    The outgoing one is kept until `wait`, after which it is sent, or over NCCL this stream goes on behind its sending.
    """

    def __init__(
        self, outgoing: Tensor, receiver: int, num_incoming: int, sender: int, group: ProcessGroup | None
    ) -> None:
        self.outgoing: Tensor | None = outgoing  # must live until it is sent
        self.incoming = outgoing.new_empty(num_incoming)
        operations = []
        if outgoing.numel():
            operations.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=receiver))
        if num_incoming:
            operations.append(dist.P2POp(dist.irecv, self.incoming, group=group, group_peer=sender))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """What came in: [num_incoming]."""
        for work in self.works:
            work.wait()
        self.outgoing = None
        self.works = []  # which hold it, too
        return self.incoming


def _num_elements(shares: Iterable[Share], k: Tensor, v: Tensor) -> int:
    """Of a message with the keys and values of these shares."""
    of_key = math.prod(k.shape[2:]) + math.prod(v.shape[2:])
    return sum((share.stop_row - share.first_row) * share.num_keys * of_key for share in shares)


def _views(flat: Tensor, shares: Iterable[Share], k: Tensor, v: Tensor) -> list[_Held]:
    """A message [_num_elements] as its shares' keys and values; k and v give heads and widths."""
    found, start = [], 0
    for share in shares:
        pair = []
        for tensor in (k, v):
            shape = (share.stop_row - share.first_row, share.num_keys, *tensor.shape[2:])
            pair.append(flat[start : start + math.prod(shape)].view(shape))
            start += math.prod(shape)
        found.append(_Held(share, *pair))
    return found


def _places(share: Share) -> Iterator[tuple[slice, slice]]:
    """(where the owner has an interval of the share's keys, where the share has it)."""
    start = 0
    for interval in share.keys:
        yield slice(interval.start, interval.stop), slice(start, start + len(interval))
        start += len(interval)


def _gathered_keys(k: Tensor, v: Tensor, ring: Ring) -> Iterator[list[_Held]]:
    """Mode all_gather: all keys in one step."""
    whole = _gather(k, v, ring)
    yield [_Held(share, *(x[share.rows] for x in whole)) for share in ring.plan.gathered_shares(ring.rank)]


def _gather(k: Tensor, v: Tensor, ring: Ring) -> list[Tensor]:
    """Keys and values of all ranks in global order: [b, L, kv_heads, d] and [b, L, kv_heads, dv]."""
    flat = torch.cat([k.flatten(), v.flatten()])
    gathered = flat.new_empty(ring.plan.layout.ring * len(flat))
    dist.all_gather_into_tensor(gathered, flat, group=ring.group)
    by_rank = gathered.view(ring.plan.layout.ring, len(flat))
    whole = []
    for local, parts in zip((k, v), by_rank.split([k.numel(), v.numel()], dim=1), strict=True):
        everything = local.new_empty(len(local), ring.plan.layout.length, *local.shape[2:])
        for rank, positions, indices in _chunks(ring):  # [R, b * S * heads * d] -> [b, L, heads, d]
            everything[:, positions] = parts[rank].view(local.shape)[:, indices]
        whole.append(everything)
    return whole


class _GatheredGradients:
    """Mode all_gather: gradients of all keys, exchanged and summed at the end."""

    def __init__(self, k: Tensor, v: Tensor, ring: Ring) -> None:
        self.ring, self.shapes = ring, (k.shape, v.shape)
        length = ring.plan.layout.length
        self.whole = [torch.zeros(len(x), length, *x.shape[2:], dtype=_wide(x), device=x.device) for x in (k, v)]

    def sums(self, step: int) -> list[_Held]:
        """Where the gradients of the only step's keys are summed."""
        shares = self.ring.plan.gathered_shares(self.ring.rank)
        return [_Held(share, *(x[share.rows] for x in self.whole)) for share in shares]

    def send(self, step: int) -> None:
        """Nothing: they go at the end."""

    def total(self) -> tuple[Tensor, Tensor]:
        """(dk [b, S, kv_heads, d], dv [b, S, kv_heads, dv]) from all readers, wide."""
        numbers = [math.prod(shape) for shape in self.shapes]
        outgoing = self.whole[0].new_empty(self.ring.plan.layout.ring, sum(numbers))
        for shape, everything, parts in zip(self.shapes, self.whole, outgoing.split(numbers, dim=1), strict=True):
            for rank, positions, indices in _chunks(self.ring):  # [b, L, heads, d] -> [R, b * S * heads * d]
                parts[rank].view(shape)[:, indices] = everything[:, positions]
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.ring.group)  # gloo has no reduce-scatter
        dk, dv = incoming.sum(0).split(numbers)
        return dk.view(self.shapes[0]), dv.view(self.shapes[1])


def _chunks(ring: Ring) -> Iterator[tuple[int, slice, slice]]:
    """(ring rank, global positions, indices into its slice) of every chunk."""
    layout = ring.plan.layout
    for rank in range(layout.ring):
        for chunk in layout.chunks_of(rank):
            local = layout.local_interval(rank, chunk)
            yield rank, slice(chunk.start, chunk.stop), slice(local.start, local.stop)
