"""Who encodes which picture, and how feature rows travel to the ranks that own their tokens (DESIGN D3).

A pure function of the window's items and the layout: every rank of a replica computes the same plan and its own route,
so nothing is negotiated. Items go longest first onto the least loaded rank. Each feature row then travels once, by one
uneven all-to-all over the replica, from the rank that encoded it to the first pipeline stage's owners of its token;
gradients travel back the same way.

With Megatron sequence parallelism a token has one owner and the way back is the exact transpose. Without it the tensor
ranks all hold the token, each gets the row, and each ends up with the row's whole gradient: returning all of them would
count it T times, so each tensor rank returns a T-th of the rows.

Letters: T C P tensor, context and pipeline sizes; replica rank = tp + T*(cp + C*pp), cp = ulysses rank + U*ring rank;
n rows. "Encoded rows" of a rank: the rows of its items in ascending item order, one after the other.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.sizes import GridSizes


@dataclass(frozen=True)
class MediaItem:
    """One picture of a window.

    Args:
        cost: of encoding it, in any unit (`media_cost`).
        num_tokens: feature rows it becomes.
        micro_batch: index within the window of the micro-batch it belongs to.
        row: of that micro-batch.
        start: global position of its first token in that row.
    """

    cost: float
    num_tokens: int
    micro_batch: int
    row: int
    start: int


@dataclass(frozen=True)
class Route:
    """One replica rank's part in the exchange: what it sends and what it receives.

    Received rows are ordered by sender, then by the sender's encoded rows. Splits are rows per replica rank.
    """

    send_rows: Tensor  # [n_send] which encoded row goes out, in order of destination
    send_splits: list[int]
    recv_splits: list[int]
    micro_batch: Tensor  # [n_recv] of each received row, within the window
    row: Tensor  # [n_recv] row of the micro-batch
    position: Tensor  # [n_recv] index in this rank's local slice of the sequence
    grad_send_rows: Tensor  # [n_grad_send] which received row's gradient goes back, in order of destination
    grad_send_splits: list[int]
    grad_recv_splits: list[int]
    grad_rows: Tensor  # [n_encoded] the encoded row of each gradient that comes back


def media_cost(num_patches: int, linear: float = 1.0, quadratic: float = 0.0) -> float:
    """Cost of encoding a picture: linear*patches (matrix products) + quadratic*patches^2 (attention)."""
    return linear * num_patches + quadratic * num_patches**2


def assign(costs: Sequence[float], num_ranks: int) -> list[int]:
    """The rank of each item: longest first, onto the least loaded rank (Graham's LPT rule); ties by index."""
    loads = [(0.0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = loads[0]
        ranks[item] = rank
        heapq.heapreplace(loads, (load + costs[item], rank))
    return ranks


def plan_media(items: Sequence[MediaItem], layout: SequenceLayout, sizes: GridSizes) -> "MediaPlan":
    """The plan of one window of one replica. `layout` is that of every row; its `tensor` is 1 without SP."""
    assert layout.tensor in (1, sizes.tensor), f"layout {layout} does not fit {sizes}"
    assert (layout.ring, layout.ulysses) == (sizes.ring, sizes.ulysses), f"layout {layout} does not fit {sizes}"
    assert all(0 <= i.start and i.start + i.num_tokens <= layout.length for i in items), "an item leaves its row"
    encoder_of = assign([item.cost for item in items], sizes.replica)
    return MediaPlan(tuple(items), tuple(encoder_of), layout, sizes)


@dataclass(frozen=True)
class MediaPlan:
    """Who encodes what, and every rank's route. Small enough to send between processes."""

    items: tuple[MediaItem, ...]
    encoder_of: tuple[int, ...]  # replica rank per item
    layout: SequenceLayout
    sizes: GridSizes

    def items_of(self, replica_rank: int) -> list[int]:
        """Items that a rank encodes, ascending."""
        return [item for item, rank in enumerate(self.encoder_of) if rank == replica_rank]

    def num_rows(self, replica_rank: int) -> int:
        """Rows that a rank encodes."""
        return sum(self.items[item].num_tokens for item in self.items_of(replica_rank))

    def route(self, replica_rank: int) -> Route:
        """What a rank sends and receives."""
        rows = _list_rows(self)
        num_copies = _num_copies(self)
        sent = rows.encoder == replica_rank
        received = rows.owner == replica_rank - replica_rank % num_copies
        returned = rows.returner == replica_rank
        # [n] rows of mine -> [n*copies], by destination, then by encoded row
        destination = (rows.owner[sent, None] + torch.arange(num_copies)).flatten()
        encoded_row = rows.encoded_row[sent].repeat_interleave(num_copies)
        return Route(
            send_rows=encoded_row[torch.argsort(destination, stable=True)],
            send_splits=self._splits(destination),
            recv_splits=self._splits(rows.encoder[received]),
            micro_batch=rows.micro_batch[received],
            row=rows.row[received],
            position=rows.position[received],
            grad_send_rows=torch.nonzero(returned[received]).flatten(),
            grad_send_splits=self._splits(rows.encoder[returned]),
            grad_recv_splits=self._splits(rows.returner[sent]),
            grad_rows=rows.encoded_row[sent][torch.argsort(rows.returner[sent], stable=True)],
        )

    def _splits(self, ranks: Tensor) -> list[int]:
        """How often each replica rank occurs."""
        return torch.bincount(ranks, minlength=self.sizes.replica).tolist()


@dataclass(frozen=True)
class _Rows:
    """Every feature row of the window, ordered by encoder, then by encoded row: seven [n] int64."""

    encoder: Tensor  # replica rank
    encoded_row: Tensor
    owner: Tensor  # replica rank of the token's owner; of the first of them where tensor ranks hold copies
    returner: Tensor  # the owner that returns the row's gradient
    micro_batch: Tensor
    row: Tensor
    position: Tensor  # in the owner's slice


def _num_copies(plan: MediaPlan) -> int:
    """Tensor ranks that hold each token: T, and 1 under sequence parallelism."""
    return plan.sizes.tensor // plan.layout.tensor


def _list_rows(plan: MediaPlan) -> _Rows:
    layout, sizes = plan.layout, plan.sizes
    order = sorted(range(len(plan.items)), key=lambda item: (plan.encoder_of[item], item))
    items = [plan.items[item] for item in order]
    num_tokens = torch.tensor([item.num_tokens for item in items], dtype=torch.int64)

    def per_row(values: list[int]) -> Tensor:  # [items] -> [n]
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(num_tokens)

    encoder = per_row([plan.encoder_of[item] for item in order])
    number = torch.arange(len(encoder))  # row among all
    token = number - per_row((num_tokens.cumsum(0) - num_tokens).tolist())  # row within its item
    position = per_row([item.start for item in items]) + token
    ring, ulysses, tensor = layout.owners(position)
    owner = tensor + sizes.tensor * (ulysses + sizes.ulysses * ring)
    return _Rows(
        encoder=encoder,
        encoded_row=_index_within(encoder),
        owner=owner,
        returner=owner + _share(encoder * sizes.replica + owner, _num_copies(plan)),
        micro_batch=per_row([item.micro_batch for item in items]),
        row=per_row([item.row for item in items]),
        position=layout.local_index(position),
    )


def _index_within(keys: Tensor) -> Tensor:
    """How many equal keys come before each: [n] -> [n]."""
    order = torch.argsort(keys, stable=True)
    counts = torch.unique_consecutive(keys[order], return_counts=True)[1]
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = torch.empty_like(keys)
    index[order] = torch.arange(len(keys)) - first
    return index


def _share(keys: Tensor, num_shares: int) -> Tensor:
    """Cuts each set of equal keys into `num_shares` nearly equal runs: [n] -> [n] number of the run."""
    _, which, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    return _index_within(keys) * num_shares // counts[which]
