"""One rank's attention as the product runs it, while the other ranks are absent: all ranks of a layout in turn.

A rank's own code runs: it packs what it would send, and computes with what it would get. What the others send is noise
that lies ready, so the network takes no time, and results mean nothing. Bytes are counted where they leave the rank.

Letters: L tokens of the row, R ring, U Ulysses ranks, d head width.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vlm.ops.attention import attention, attention_backward
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.parallel import ring, ulysses
from megatron_vlm.parallel.layout import Documents, Interval, SequenceLayout, blocks, work
from megatron_vlm.parallel.ring import Ring, ring_attention
from megatron_vlm.parallel.ring_plan import RingPlan
from megatron_vlm.parallel.ulysses import HeadSplit, to_heads, to_sequence

LEAST_DOCUMENT, MOST_DOCUMENT = 64, 4  # of a packed row: from L/64 to L/4 tokens


@dataclass(frozen=True)
class Shape:
    """An attention layer, where it runs, and by which backend of `ops.attention`."""

    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    backend: str = AUTO

    def random(self, num_tokens: int, heads: int) -> Tensor:
        """[1, num_tokens, heads, d], normally distributed."""
        return torch.randn(1, num_tokens, heads, self.width, dtype=self.dtype, device=self.device)

    def inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        q, k, v, dout = (self.random(num_tokens, n) for n in (self.heads, self.kv_heads, self.kv_heads, self.heads))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    @property
    def scale(self) -> float:
        """Scale of the scores."""
        return float(self.width**-0.5)


@dataclass(frozen=True)
class Seconds:
    """The fastest forward and the fastest backward pass of some rounds."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """One after the other."""
        return self.forward + self.backward


@dataclass(frozen=True)
class RankCost:
    """Cost of one rank. `pairs`: visible pairs of a query and a key, over its query heads."""

    seconds: Seconds
    pairs: int
    sent_forward_bytes: int
    sent_backward_bytes: int


def draw_documents(length: int, seed: int = 0) -> Documents:
    """A packed row: documents of L/64 to L/4 tokens, evenly drawn, until it is full."""
    random, lengths = np.random.default_rng(seed), list[int]()
    while (left := length - sum(lengths)) > 0:
        drawn = int(random.integers(max(1, length // LEAST_DOCUMENT), length // MOST_DOCUMENT, endpoint=True))
        lengths.append(min(drawn, left))
    return Documents.packed(lengths, length)


def clock(device: torch.device) -> float:
    """Processor time on the CPU, which other jobs do not add to; else the time when the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(rounds: Sequence[Seconds]) -> Seconds:
    """Fastest time of each direction."""
    return Seconds(min(one.forward for one in rounds), min(one.backward for one in rounds))


def single_device(shape: Shape, documents: Documents, rounds: int) -> Seconds:
    """The row by one call per document and direction, and nothing else: what a layout's ranks can at best divide."""
    whole = Interval(0, documents.length)
    q, k, v, dout = (tensor.detach() for tensor in shape.inputs(documents.length))
    squares = [
        (slice(block.queries.start, block.queries.stop), block) for block in blocks(whole, whole, documents, True, None)
    ]
    rules: Any = {"causal": True, "softmax_scale": shape.scale, "backend": shape.backend}

    def once() -> Seconds:
        started = clock(shape.device)
        found = [attention(q[:, at], k[:, at], v[:, at], offset=block.offset, **rules) for at, block in squares]
        middle = clock(shape.device)
        for (at, block), (out, lse) in zip(squares, found, strict=True):
            attention_backward(dout[:, at], q[:, at], k[:, at], v[:, at], out, lse, offset=block.offset, **rules)
        return Seconds(middle - started, clock(shape.device) - middle)

    return fastest([once() for _ in range(rounds)])


def in_turn(shape: Shape, layout: SequenceLayout, documents: Documents, rounds: int) -> list[RankCost]:
    """Every rank of a layout, one after the other; rank = ulysses rank + U * ring rank."""
    pairs = work(layout, documents, causal=True, window=None).sum(1).tolist()
    split = HeadSplit(shape.heads, shape.kv_heads, layout.ulysses)
    plan = RingPlan(layout, (documents,))
    places = [(r, u) for r in range(layout.ring) for u in range(layout.ulysses)]
    found = []
    with absent_ranks() as post:
        for r, u in places:
            times, of_ulysses, of_rank = [], _alone(u, layout.ulysses), Ring(plan, _alone(r, layout.ring))
            for _ in range(rounds):
                post.sent_bytes = 0
                q, k, v, dout = shape.inputs(layout.local_length)
                started = clock(shape.device)
                out = attend(q, k, v, shape, split, of_rank, of_ulysses)
                middle, forward_bytes = clock(shape.device), post.sent_bytes
                torch.autograd.grad(out, (q, k, v), dout)
                times.append(Seconds(middle - started, clock(shape.device) - middle))
            sent = forward_bytes, post.sent_bytes - forward_bytes
            found.append(RankCost(fastest(times), pairs[r] * len(split.query_heads(u)), *sent))
    return found


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    split: HeadSplit,
    of_ring: Ring,
    of_ulysses: ProcessGroup | None,
) -> Tensor:
    """Attends as `ContextAttention` does, with a rank's tokens [1, L/RU, heads or kv_heads, d] after RoPE."""
    kv_index = split.kv_index(0 if of_ulysses is None else of_ulysses.rank())
    by_heads = to_heads(q, k, v, split, of_ulysses)
    scoring: Any = {"softmax_scale": shape.scale, "backend": shape.backend}
    out = ring_attention(*by_heads, of_ring, kv_index=kv_index, **scoring)
    return to_sequence(out, split, of_ulysses)


@dataclass(frozen=True)
class _Alone:
    """Stands for a process group of which only this rank is here."""

    place: int
    num_ranks: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.num_ranks


def _alone(place: int, num_ranks: int) -> ProcessGroup | None:
    return cast(ProcessGroup, _Alone(place, num_ranks)) if num_ranks > 1 else None


class Post:
    """Takes what a rank sends and hands it noise."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.noise: dict[torch.dtype, Tensor] = {}

    def send(self, like: Tensor, num_elements: int) -> None:
        """Counts a message."""
        self.sent_bytes += num_elements * like.element_size()

    def receive(self, like: Tensor, num_elements: int) -> Tensor:
        """A message [num_elements], to be read only; made before the clock runs but for the first of its size."""
        have = self.noise.get(like.dtype)
        if have is None or have.numel() < num_elements:
            have = self.noise[like.dtype] = torch.randn(num_elements, dtype=like.dtype, device=like.device)
        return have[:num_elements]


class _Transfer:
    """The ring's transfer, which has always arrived."""

    def __init__(
        self, post: Post, outgoing: Tensor, receiver: int, num_incoming: int, sender: int, group: ProcessGroup
    ) -> None:
        post.send(outgoing, outgoing.numel())
        self.incoming = post.receive(outgoing, num_incoming)

    def wait(self) -> Tensor:
        return self.incoming


class _Exchange(torch.autograd.Function):
    """The all-to-all, which has always arrived; what a rank sends itself is not counted."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, post: Post, sent: Sequence[int], received: Sequence[int], rank: int) -> Tensor:
        ctx.post, ctx.num_rows, ctx.num_back = post, len(rows), sum(received) - received[rank]
        post.send(rows, len(rows) - sent[rank])
        return post.receive(rows, sum(received))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        ctx.post.send(gradients[0], ctx.num_back)
        return ctx.post.receive(gradients[0], ctx.num_rows), None, None, None, None


@contextmanager
def absent_ranks() -> Iterator[Post]:
    """Within, ring and all-to-all exchange with the post instead of other ranks."""
    post = Post()

    def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
        return cast(Tensor, _Exchange.apply(rows.contiguous(), post, sent, received, group.rank()))

    with (
        mock.patch.object(ring, "_Transfer", partial(_Transfer, post)),
        mock.patch.object(ulysses, "all_to_all_rows", exchange),
    ):
        yield post
