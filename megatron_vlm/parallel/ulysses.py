"""Ulysses: from a slice of the sequence with all heads to the whole sequence with some heads, and back (DESIGN D6).

After DeepSpeed-Ulysses (Jacobs et al. 2023), for any number of heads: query heads are dealt out as evenly as they go,
and each rank gets the kv heads that its query heads need. Queries, keys and values travel in one all-to-all with uneven
splits; a kv head that several ranks need is sent to each, and its gradients are summed in fp32.

    28 query heads, 4 kv heads (groups of 7), 8 ranks:  rank 0 has 0-3 of kv head 0, rank 1 has 4-7 of kv heads 0 and 1

Hazards: a rank's kv heads need not serve equally many of its query heads, so kernels that know only equal groups are
called once per `uniform_groups`. A rank without heads still takes part in both exchanges, forward and backward: what
it computes from its empty tensors must stay connected to them for autograd, or the others wait forever.

Letters: b rows, s tokens of the ring rank, U ulysses ranks, d and dv head widths of keys and of values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vlm.runtime.collectives import all_to_all_rows


@dataclass(frozen=True)
class HeadSplit:
    """The heads that each Ulysses rank attends with. Pure.

    Args:
        heads: query heads in all; query head i reads kv head i // (heads / kv_heads).
        kv_heads: key and value heads in all; divides `heads`.
        ranks: may be more than there are heads; the last ones then have none.
    """

    heads: int
    kv_heads: int
    ranks: int

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, f"{self.kv_heads} kv heads do not divide {self.heads} query heads"

    def query_heads(self, rank: int) -> range:
        """A contiguous run; sizes differ by at most one, the first ranks have the larger."""
        size, larger = divmod(self.heads, self.ranks)
        start = rank * size + min(rank, larger)
        return range(start, start + size + (rank < larger))

    def key_heads(self, rank: int) -> range:
        """The kv heads that the rank's query heads read: a contiguous run, which neighbours may share in part."""
        queries, group = self.query_heads(rank), self.heads // self.kv_heads
        return range(queries[0] // group, queries[-1] // group + 1) if queries else range(0)

    def kv_index(self, rank: int) -> tuple[int, ...]:
        """Index of the rank's kv head that each of its query heads reads."""
        group, first = self.heads // self.kv_heads, self.key_heads(rank).start
        return tuple(head // group - first for head in self.query_heads(rank))


def uniform_groups(kv_index: Sequence[int]) -> list[tuple[slice, slice]]:
    """The longest runs in which every kv head has equally many query heads: (query heads, kv heads) of each.

    Args:
        kv_index: the kv head of each query head, ascending.
    """
    runs: list[tuple[slice, slice]] = []
    query = 0
    for kv, equal in groupby(kv_index):
        count = len(list(equal))
        queries, keys = slice(query, query + count), slice(kv, kv + 1)
        if runs:
            last_queries, last_keys = runs[-1]
            last_count = (last_queries.stop - last_queries.start) // (last_keys.stop - last_keys.start)
            if last_keys.stop == kv and last_count == count:
                runs.pop()
                queries, keys = slice(last_queries.start, queries.stop), slice(last_keys.start, keys.stop)
        runs.append((queries, keys))
        query += count
    return runs


def _rank_parts(q: Tensor, k: Tensor, v: Tensor, split: HeadSplit) -> Iterator[Tensor]:
    """Views of what each rank needs, in the order in which it is sent: rank 0's q, k and v heads, rank 1's, ..."""
    for rank in range(split.ranks):
        for x, heads in ((q, split.query_heads(rank)), (k, split.key_heads(rank)), (v, split.key_heads(rank))):
            yield x[:, :, heads.start : heads.stop]


class _Pack(torch.autograd.Function):
    """q, k, v -> every rank's parts, flat: a kv head once for each rank that needs it. Backward sums those in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: HeadSplit) -> Tensor:
        ctx.split, ctx.shapes = split, (q.shape, k.shape, v.shape)
        return torch.cat([part.reshape(-1) for part in _rank_parts(q, k, v, split)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (flat,) = gradients
        wide = torch.promote_types(flat.dtype, torch.float32)
        q, k, v = (
            flat.new_zeros(shape, dtype=dtype)
            for shape, dtype in zip(ctx.shapes, (flat.dtype, wide, wide), strict=True)
        )
        parts = list(_rank_parts(q, k, v, ctx.split))
        for part, gradient in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part += gradient.view(part.shape)
        return q, k.to(flat.dtype), v.to(flat.dtype), None


def to_heads(
    q: Tensor, k: Tensor, v: Tensor, split: HeadSplit, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of this rank's tokens -> this rank's heads of all tokens: one all-to-all, differentiable.

    Args:
        q: [b, s/U, heads, d]. k: [b, s/U, kv_heads, d]. v: [b, s/U, kv_heads, dv]. One dtype; s/U equal on all ranks.
        group: group rank = Ulysses rank; the slices in rank order are the ring rank's tokens in its own order. None
            will do where `split.ranks` is 1: nothing is exchanged.

    Returns:
        q [b, s, heads of this rank, d], and k and v [b, s, kv heads it needs, d or dv].
    """
    if split.ranks == 1:
        return q, k, v
    assert group is not None and group.size() == split.ranks, (group, split)
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    parts = list(_rank_parts(q, k, v, split))
    sizes = [sum(part.numel() for part in parts[3 * rank : 3 * rank + 3]) for rank in range(split.ranks)]
    rank = group.rank()
    received = all_to_all_rows(_Pack.apply(q, k, v, split), sizes, [sizes[rank]] * split.ranks, group)
    mine = parts[3 * rank : 3 * rank + 3]  # from every rank come parts of these shapes
    from_ranks = received.view(split.ranks, sizes[rank]).split([part.numel() for part in mine], dim=1)
    queries, keys, values = (
        # [U, b * s/U * heads * d] -> [U, b, s/U, heads, d] -> [b, s, heads, d]
        x.unflatten(1, part.shape).transpose(0, 1).flatten(1, 2)
        for x, part in zip(from_ranks, mine, strict=True)
    )
    return queries, keys, values


def to_sequence(out: Tensor, split: HeadSplit, group: ProcessGroup | None) -> Tensor:
    """This rank's heads of all tokens [b, s, its heads, dv] -> all heads of its tokens [b, s/U, heads, dv].

    `split` and `group` as in `to_heads`.
    """
    if split.ranks == 1:
        return out
    assert group is not None and group.size() == split.ranks, (group, split)
    by_rank = out.unflatten(1, (split.ranks, -1)).transpose(0, 1)  # [b, s, ...] -> [U, b, s/U, heads, dv]
    _, rows, num_tokens, _, width = by_rank.shape
    shapes = [(rows, num_tokens, len(split.query_heads(rank)), width) for rank in range(split.ranks)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    sent = by_rank.reshape(out.numel())
    received = all_to_all_rows(sent, [sizes[group.rank()]] * split.ranks, sizes, group)
    return torch.cat([x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)], dim=2)
