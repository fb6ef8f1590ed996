"""Assignment of images to the ranks that encode them, and routes of feature rows to their tokens (DESIGN D3).

A pure function of the window's items and the layout: every rank computes the same plan and its own route, so nothing is
negotiated. Items go longest first onto the least loaded rank. Each feature row then travels once, by one uneven
all-to-all, from the rank that encoded it to the first pipeline stage's owners of its token; gradients travel back the
same way. The *media group* that shares the work is one replica, or the world: then the items are those of all replicas'
windows, and a replica with little to encode works for the others.

Over the world every rank must know of every item its cost, rows and replica, which are metadata; where an item's tokens
stand is known from its sample's text, and a rank reads only the texts that concern it: its replica's, and those of the
images it encodes. `start` is UNKNOWN for the others, whose rows neither leave nor reach this rank.

With Megatron sequence parallelism a token has one owner and the way back is the exact transpose. Without it the tensor
ranks all hold the token, each gets the row, and each ends up with the row's whole gradient: returning all of them would
count it T times, so each tensor rank returns a T-th of the rows.

Letters: T C D P tensor, context, data and pipeline sizes; a rank's number in its media group, the *media rank*, is
tp + T*(cp + C*pp) in a replica and the global rank, tp + T*(cp + C*(dp + D*pp)), in the world; cp = ulysses rank +
U*ring rank; n rows. "Encoded rows" of a rank: the rows of its items in ascending item order, one after the other.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.sizes import Coordinates, GridSizes

UNKNOWN = -1  # a place that does not concern this rank


@dataclass(frozen=True)
class MediaItem:
    """One image of a window.

    Args:
        cost: of encoding it, in any unit (`MediaCost`).
        num_tokens: feature rows it becomes.
        micro_batch: the micro-batch it belongs to, by its index in the step (`StepBatch.micro_batches`).
        row: of that micro-batch.
        start: global position of its first token in that row; UNKNOWN where this rank neither encodes nor owns it.
        data: data-parallel rank whose micro-batch it is; of no account in a replica's own plan.
        length: tokens of its row, where the rows of a window differ; None: those of the plan's layout.
    """

    cost: float
    num_tokens: int
    micro_batch: int
    row: int
    start: int
    data: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Route:
    """One rank's part in the exchange: what it sends and what it receives.

    Received rows are ordered by sender, then by the sender's encoded rows. Splits are rows per media rank.
    """

    send_rows: Tensor  # [n_send] which encoded row goes out, in order of destination
    send_splits: list[int]
    recv_splits: list[int]
    micro_batch: Tensor  # [n_recv] of each received row: its index in the step
    row: Tensor  # [n_recv] row of the micro-batch
    position: Tensor  # [n_recv] index in this rank's local slice of the sequence
    grad_send_rows: Tensor  # [n_grad_send] which received row's gradient goes back, in order of destination
    grad_send_splits: list[int]
    grad_recv_splits: list[int]
    grad_rows: Tensor  # [n_encoded] the encoded row of each gradient that comes back
    over_world: bool = False  # the media group is the world, and not the replica


@dataclass(frozen=True)
class MediaCost:
    """Cost of an image: linear*patches (matrix products) + quadratic*patches^2 (attention), in any unit."""

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, num_patches: int) -> float:
        """Cost of one image."""
        return self.linear * num_patches + self.quadratic * num_patches**2


def assign(costs: Sequence[float], num_ranks: int) -> list[int]:
    """The rank of each item: longest first, onto the least loaded rank (Graham's LPT rule). Items of one cost change
    places until each rank's are neighbours: a rank that encodes neighbouring frames of a video decodes no others."""
    loads = [(0.0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    by_cost = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    for cost, items in groupby(by_cost, key=costs.__getitem__):
        of_one_cost = list(items)
        taken = []
        for _ in of_one_cost:
            load, rank = loads[0]
            taken.append(rank)
            heapq.heapreplace(loads, (load + cost, rank))
        for item, rank in zip(of_one_cost, sorted(taken), strict=True):
            ranks[item] = rank
    return ranks


def plan_media(
    items: Sequence[MediaItem], layout: SequenceLayout, sizes: GridSizes, over_world: bool = False
) -> "MediaPlan":
    """The plan of one window.

    Args:
        items: of one replica, or of all of them in the same order on every rank.
        layout: of every row, but of items with a `length` of their own, which the same ranks cut; its `tensor` is 1
            without SP.
        over_world: the media group is the world.
    """
    assert layout.tensor in (1, sizes.tensor), f"layout {layout} does not fit {sizes}"
    assert (layout.ring, layout.ulysses) == (sizes.ring, sizes.ulysses), f"layout {layout} does not fit {sizes}"
    known = [item for item in items if item.start != UNKNOWN]
    assert all(0 <= item.start and item.start + item.num_tokens <= (item.length or layout.length) for item in known), (
        "an item leaves its row"
    )
    num_ranks = sizes.world if over_world else sizes.replica
    encoder_of = assign([item.cost for item in items], num_ranks)
    return MediaPlan(tuple(items), tuple(encoder_of), layout, sizes, over_world)


@dataclass(frozen=True)
class MediaPlan:
    """Assignment of images to ranks, and every rank's route. Small enough to send between processes."""

    items: tuple[MediaItem, ...]
    encoder_of: tuple[int, ...]  # media rank per item
    layout: SequenceLayout
    sizes: GridSizes
    over_world: bool = False

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the media group."""
        return self.sizes.world if self.over_world else self.sizes.replica

    def media_rank(self, at: Coordinates) -> int:
        """The number in its media group of the rank at these coordinates."""
        return self.sizes.rank(at) if self.over_world else self.sizes.replica_rank(at)

    def items_of(self, media_rank: int) -> list[int]:
        """Items that a rank encodes, ascending."""
        return [item for item, rank in enumerate(self.encoder_of) if rank == media_rank]

    def num_rows(self, media_rank: int) -> int:
        """Rows that a rank encodes."""
        return sum(self.items[item].num_tokens for item in self.items_of(media_rank))

    def route(self, media_rank: int) -> Route:
        """Rows that a rank sends and receives."""
        self._assert_known(media_rank)
        rows = _list_rows(self)
        num_copies = _num_copies(self)
        sent = rows.encoder == media_rank
        received = rows.owner == media_rank - media_rank % num_copies
        returned = rows.returner == media_rank
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
            over_world=self.over_world,
        )

    def _splits(self, ranks: Tensor) -> list[int]:
        """Counts how often each media rank occurs."""
        return torch.bincount(ranks, minlength=self.num_ranks).tolist()

    def _assert_known(self, media_rank: int) -> None:
        """Rows of an unknown place would be left out in silence."""
        own = self.sizes.coordinates(media_rank).data if self.over_world else None
        for item, encoder in zip(self.items, self.encoder_of, strict=True):
            concerns = encoder == media_rank or own is None or item.data == own
            assert item.start != UNKNOWN or not concerns, f"rank {media_rank} needs the place of {item}"


@dataclass(frozen=True)
class _Rows:
    """Every feature row of known place, ordered by encoder, then by encoded row: seven [n] int64."""

    encoder: Tensor  # media rank
    encoded_row: Tensor
    owner: Tensor  # media rank of the token's owner; of the first of them where tensor ranks hold copies
    returner: Tensor  # the owner that returns the row's gradient
    micro_batch: Tensor
    row: Tensor
    position: Tensor  # in the owner's slice


def _num_copies(plan: MediaPlan) -> int:
    """Tensor ranks that hold each token: T, and 1 under sequence parallelism."""
    return plan.sizes.tensor // plan.layout.tensor


def _list_rows(plan: MediaPlan) -> _Rows:
    layout, sizes = plan.layout, plan.sizes
    known = [number for number, item in enumerate(plan.items) if item.start != UNKNOWN]
    order = sorted(known, key=lambda number: (plan.encoder_of[number], number))
    items = [plan.items[number] for number in order]
    num_tokens = torch.tensor([item.num_tokens for item in items], dtype=torch.int64)

    def per_row(values: list[int]) -> Tensor:  # [items] -> [n]
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(num_tokens)

    encoder = per_row([plan.encoder_of[number] for number in order])
    number = torch.arange(len(encoder))  # row among all
    token = number - per_row((num_tokens.cumsum(0) - num_tokens).tolist())  # row within its item
    position = per_row([item.start for item in items]) + token
    lengths = per_row([item.length or layout.length for item in items])
    ring, ulysses, tensor, local_index = _places(layout, position, lengths)
    owner = tensor + sizes.tensor * (ulysses + sizes.ulysses * ring)  # all on stage 0
    if plan.over_world:
        owner += sizes.tensor * sizes.context * per_row([item.data for item in items])
    return _Rows(
        encoder=encoder,
        encoded_row=_index_within(encoder),
        owner=owner,
        returner=owner + _share(encoder * plan.num_ranks + owner, _num_copies(plan)),
        micro_batch=per_row([item.micro_batch for item in items]),
        row=per_row([item.row for item in items]),
        position=local_index,
    )


def _places(layout: SequenceLayout, position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ring, ulysses, tensor) ranks that own positions [n] of rows of `lengths` [n], and the index in their slice."""
    places = torch.empty(4, len(position), dtype=torch.int64)
    for length in lengths.unique().tolist():
        same = lengths == length
        rows = replace(layout, length=length)
        places[:, same] = torch.stack([*rows.owners(position[same]), rows.local_index(position[same])])
    ring, ulysses, tensor, local_index = places
    return ring, ulysses, tensor, local_index


def _index_within(keys: Tensor) -> Tensor:
    """Counts the equal keys before each: [n] -> [n]."""
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
