"""Ring attention: each ring rank's queries with the keys of all (DESIGN D6), by blocks merged in fp32.

Rank 0 of a ring of 3, where K1 are the keys and values of rank 1; the backward pass takes the same steps:

    step   computes with   sends meanwhile   receives meanwhile   sends after it, in the backward pass
    0      K0              K0 to rank 1      K2 from rank 2
    1      K2              K0 to rank 2      K1 from rank 1       gradients of K2 to rank 2
    2      K1                                                     gradients of K1 to rank 1

Mode `p2p`: at step s rank r computes with keys of rank r-s, while the keys of the next step are on their way; in the
backward pass their gradients go home meanwhile. Keys go from owner to reader directly, and not from neighbour to
neighbour: so a reader gets the keys it reads and no others, gradients have one way home instead of the rest of the
ring, and a document or a window that ends nearby costs nothing far away. Mode `all_gather`: keys of all ranks at once,
one call per query chunk and document, nothing to merge; memory grows with L. Both carry kv heads only.

A step's blocks, of all rows and documents, are one call of `ops.attention_blocks`, which adds them to the running out
and lse, or their gradients to the sums. The backward pass takes every block's gradients from the final out and lse
(FlashAttention, Dao et al. 2022) and merges nothing. Sums are kept, and gradients sent, in fp32: in bf16 the error
grows with the ring. A message is the keys of all rows, one row behind the other, and then the values.

Hazards. The ring has a group of its own, on which nothing else is in flight. Over NCCL that group must have run one
collective before: a rank that needs no keys takes no part in a step, which only a group already connected allows.

Letters: b rows; L length; R ring; S = L/R; heads and kv_heads of this (tensor and Ulysses) rank; d, dv head widths.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Required, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_vlm.ops.attention_blocks import (
    Rectangle,
    Rectangles,
    SavedForward,
    Scoring,
    attention_into,
    attention_into_backward,
)
from megatron_vlm.parallel.ring_plan import KeyRequest, RingPlan
from megatron_vlm.parallel.ulysses import uniform_groups

RingMode = Literal["p2p", "all_gather"]


@dataclass(frozen=True)
class Ring:
    """The ring's work plan and the group it runs over.

    Args:
        plan: layout, documents and visibility; equal on all ranks of the group.
        group: group rank = ring rank; None for a ring of one.
        mode: p2p | all_gather.
    """

    plan: RingPlan
    group: ProcessGroup | None = None
    mode: RingMode = "p2p"
    _known: dict[int, Rectangles] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    def rectangles(self, step: int) -> Rectangles:
        """Rectangles that this rank computes at a step, with the keys as `_steps` gives them."""
        if step not in self._known:
            if self.gathers:
                self._known[step] = _rectangles(self.plan.gathered_requests(self.rank), in_message=False)
            else:
                self._known[step] = _rectangles(self.plan.requests(self.rank, step), in_message=step > 0)
        return self._known[step]


def _rectangles(requests: Sequence[KeyRequest], in_message: bool) -> Rectangles:
    """The requests' calls; in a message the keys of every row of every request stand one behind the other."""
    found, start = [], 0
    for request in requests:
        for call in request.calls:
            found.append(
                Rectangle(
                    rows=(request.first_row, request.stop_row),
                    queries=(call.queries.start, call.queries.stop),
                    keys=(start + call.keys.start, start + call.keys.stop),
                    causal=call.causal,
                    offset=call.offset,
                    window=call.window,
                    pitch=request.num_keys if in_message else None,
                )
            )
        if in_message:
            start += (request.stop_row - request.first_row) * request.num_keys
    return Rectangles(tuple(found))


class ScoringOptions(TypedDict, total=False):
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
    **scoring: Unpack[ScoringOptions],
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
    return _RingAttention.apply(q, k, v, ring, uniform_groups(kv_index), Scoring(**scoring))


Runs = Sequence[tuple[slice, slice]]  # (query heads, kv heads) where every kv head has equally many queries


@dataclass(frozen=True)
class KeyValues:
    """Keys and values at hand, or their gradients: [b, keys, kv_heads, d or dv], or [1, keys, ...] in a message."""

    k: Tensor
    v: Tensor

    def heads(self, kv_heads: slice) -> tuple[Tensor, Tensor]:
        """Selects some of the heads."""
        return self.k[:, :, kv_heads], self.v[:, :, kv_heads]


class _RingAttention(torch.autograd.Function):
    """Forward adds blocks; backward sums the blocks' gradients and sends those of other ranks' keys home."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, runs: Runs, scoring: Scoring) -> Tensor:
        rows, length, heads, _ = q.shape
        out = torch.zeros(rows, length, heads, v.shape[3], dtype=_wide(q), device=q.device)
        lse = torch.full((rows, heads, length), -torch.inf, dtype=_wide(q), device=q.device)
        for step, keys in enumerate(_steps(k, v, ring)):
            for of_run, kv_heads in runs:
                totals = out[:, :, of_run], lse[:, of_run]
                attention_into(q[:, :, of_run], *keys.heads(kv_heads), totals, ring.rectangles(step), scoring)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.runs, ctx.scoring = ring, runs, scoring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (dout,), (q, k, v, out, lse), ring = gradients, ctx.saved_tensors, ctx.ring
        dq = torch.zeros_like(q, dtype=_wide(q))
        saved = [
            SavedForward(dout[:, :, heads], q[:, :, heads], out[:, :, heads], lse[:, heads]) for heads, _ in ctx.runs
        ]
        accumulator = (_GatheredAccumulator if ring.gathers else _TravellingAccumulator)(k, v, ring)
        for step, keys in enumerate(_steps(k, v, ring)):
            sums = accumulator.sums(step)
            for of_run, (heads, kv_heads) in zip(saved, ctx.runs, strict=True):
                totals = dq[:, :, heads], *sums.heads(kv_heads)
                attention_into_backward(of_run, *keys.heads(kv_heads), totals, ring.rectangles(step), ctx.scoring)
            accumulator.send(step)
        dk, dv = accumulator.total()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums are kept."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _steps(k: Tensor, v: Tensor, ring: Ring) -> Iterator[KeyValues]:
    """The keys and values of each step, to be used before the next is asked for."""
    return _gathered_keys(k, v, ring) if ring.gathers else _travelling_keys(k, v, ring)


def _travelling_keys(k: Tensor, v: Tensor, ring: Ring) -> Iterator[KeyValues]:
    """Mode p2p: the next step's are under way while a step's are used."""
    size = ring.plan.layout.ring
    in_flight: _Transfer | None = None
    for step in range(size):
        used = in_flight
        in_flight = _fetch(k, v, ring, step + 1) if step + 1 < size else None
        requests = ring.plan.requests(ring.rank, step)
        yield KeyValues(k, v) if used is None else _message(used.wait(), requests, k, v)


def _fetch(k: Tensor, v: Tensor, ring: Ring, step: int) -> "_Transfer":
    """Starts to send this rank's keys to their reader of the step, and to receive those it reads itself."""
    size = ring.plan.layout.ring
    reader, owner = (ring.rank + step) % size, (ring.rank - step) % size
    sent, received = ring.plan.requests(reader, step), ring.plan.requests(ring.rank, step)
    outgoing = k.new_empty(_num_elements(sent, k, v))
    for local, message in _pairs(KeyValues(k, v), _message(outgoing, sent, k, v), sent):
        message.copy_(local)
    return _Transfer(outgoing, reader, _num_elements(received, k, v), owner, ring.group)


class _TravellingAccumulator:
    """Mode p2p: gradients of a step's keys go to their owner while the next step is computed."""

    def __init__(self, k: Tensor, v: Tensor, ring: Ring) -> None:
        self.ring = ring
        self.own = KeyValues(torch.zeros_like(k, dtype=_wide(k)), torch.zeros_like(v, dtype=_wide(v)))
        self.outgoing = self.own.k.new_empty(0)
        self.in_flight: tuple[tuple[KeyRequest, ...], _Transfer] | None = None

    def sums(self, step: int) -> KeyValues:
        """Sums of the gradients of a step's keys."""
        if step == 0:
            return self.own
        dk, dv = self.own.k, self.own.v
        requests = self.ring.plan.requests(self.ring.rank, step)
        self.outgoing = dk.new_zeros(_num_elements(requests, dk, dv))
        return _message(self.outgoing, requests, dk, dv)

    def send(self, step: int) -> None:
        """Sends a step's sums to the owner, and takes in what the step before brought."""
        if step == 0:
            return
        size = self.ring.plan.layout.ring
        reader, owner = (self.ring.rank + step) % size, (self.ring.rank - step) % size
        requests = self.ring.plan.requests(reader, step)
        before = self.in_flight
        num_incoming = _num_elements(requests, self.own.k, self.own.v)
        self.in_flight = requests, _Transfer(self.outgoing, owner, num_incoming, reader, self.ring.group)
        self._add(before)

    def total(self) -> tuple[Tensor, Tensor]:
        """(dk [b, S, kv_heads, d], dv [b, S, kv_heads, dv]) from all readers, wide."""
        self._add(self.in_flight)
        return self.own.k, self.own.v

    def _add(self, in_flight: "tuple[tuple[KeyRequest, ...], _Transfer] | None") -> None:
        if in_flight is None:
            return
        requests, transfer = in_flight
        arrived = _message(transfer.wait(), requests, self.own.k, self.own.v)
        for local, message in _pairs(self.own, arrived, requests):
            local += message


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
        """Waits, and returns what came in: [num_incoming]."""
        for work in self.works:
            work.wait()
        self.outgoing = None
        self.works = []  # which hold it, too
        return self.incoming


def _num_elements(requests: Iterable[KeyRequest], k: Tensor, v: Tensor) -> int:
    """Size of a message with the keys and values of these requests."""
    of_key = math.prod(k.shape[2:]) + math.prod(v.shape[2:])
    return sum((request.stop_row - request.first_row) * request.num_keys * of_key for request in requests)


def _message(flat: Tensor, requests: Iterable[KeyRequest], k: Tensor, v: Tensor) -> KeyValues:
    """A message [_num_elements] as keys [1, keys, kv_heads, d] and values [1, keys, kv_heads, dv]; k and v give the
    heads and widths. Of no heads, it is empty, and its keys are counted all the same."""
    num_keys = sum((request.stop_row - request.first_row) * request.num_keys for request in requests)
    keys, values = flat.split([num_keys * math.prod(x.shape[2:]) for x in (k, v)])
    return KeyValues(keys.view(1, num_keys, *k.shape[2:]), values.view(1, num_keys, *v.shape[2:]))


def _pairs(local: KeyValues, message: KeyValues, requests: Iterable[KeyRequest]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields some of the requests' keys or values, the owner's and the message's: [rows, n, kv_heads, d]."""
    start = 0
    for request in requests:
        num_rows, at = request.stop_row - request.first_row, start
        start += num_rows * request.num_keys
        for at_home, away in _places(request):
            for own, moved in ((local.k, message.k), (local.v, message.v)):
                rows = moved[0, at:start].unflatten(0, (num_rows, request.num_keys))
                yield own[request.rows, at_home], rows[:, away]


def _places(request: KeyRequest) -> Iterator[tuple[slice, slice]]:
    """Yields the place of an interval of the request's keys at its owner, and its place in the request."""
    start = 0
    for interval in request.keys:
        yield slice(interval.start, interval.stop), slice(start, start + len(interval))
        start += len(interval)


def _gathered_keys(k: Tensor, v: Tensor, ring: Ring) -> Iterator[KeyValues]:
    """Mode all_gather: all keys in one step."""
    yield KeyValues(*_gather(k, v, ring))


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


class _GatheredAccumulator:
    """Mode all_gather: gradients of all keys, exchanged and summed at the end."""

    def __init__(self, k: Tensor, v: Tensor, ring: Ring) -> None:
        self.ring, self.shapes = ring, (k.shape, v.shape)
        length = ring.plan.layout.length
        self.whole = [torch.zeros(len(x), length, *x.shape[2:], dtype=_wide(x), device=x.device) for x in (k, v)]

    def sums(self, step: int) -> KeyValues:
        """Sums of the gradients of the only step's keys."""
        return KeyValues(*self.whole)

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
