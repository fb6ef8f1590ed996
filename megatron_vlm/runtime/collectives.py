"""The collectives we call ourselves. The group is always an argument; a group of one rank communicates nothing.

torch.distributed.nn's differentiable collectives fail on sub-groups (traps B27), hence our own.
The hazard of every collective: all ranks of the group must call it, those with nothing to send too.

Shapes: n_send and n_recv are row counts, `...` any trailing shape equal on all ranks.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vlm.runtime.device import current_device

T = TypeVar("T")


class _AllToAllRows(torch.autograd.Function):
    """Rows out by `send_splits`, in by `recv_splits`; the gradient travels with the two exchanged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_splits: list[int], recv_splits: list[int], group: ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (send_splits, recv_splits), group
        received = rows.new_empty(sum(recv_splits), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), recv_splits, send_splits, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        send_splits, recv_splits = ctx.splits
        return _AllToAllRows.apply(gradients[0], recv_splits, send_splits, ctx.group), None, None, None


def all_to_all_rows(
    rows: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], group: ProcessGroup
) -> Tensor:
    """Uneven all-to-all over the first dimension, differentiable.

    Args:
        rows: [n_send, ...], first the rows for group rank 0, then for 1, ...
        send_splits: rows for each group rank; sums to n_send.
        recv_splits: rows from each group rank.

    Returns:
        [n_recv, ...], first the rows from group rank 0, then from 1, ...
    """
    assert len(send_splits) == len(recv_splits) == group.size(), (send_splits, recv_splits, group.size())
    assert sum(send_splits) == len(rows), f"{len(rows)} rows, splits {send_splits}"
    if group.size() == 1:
        return rows.clone()
    return _AllToAllRows.apply(rows, list(send_splits), list(recv_splits), group)


def all_gather_objects(value: T, group: ProcessGroup) -> list[T]:
    """Every rank's picklable `value`, by group rank."""
    if group.size() == 1:
        return [value]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_objects(value: T, group: ProcessGroup) -> list[T] | None:
    """Every rank's picklable `value` by group rank, on group rank 0 alone; None on the others."""
    if group.size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, gathered, group=group, group_dst=0)
    return gathered


def broadcast_object(value: T | None, group: ProcessGroup) -> T:
    """Group rank 0's picklable `value`, on every rank; the others' is not looked at."""
    if group.size() == 1:
        assert value is not None
        return value
    shared: list[Any] = [value]
    dist.broadcast_object_list(shared, group=group, group_src=0)
    return shared[0]


def all_reduce_(tensor: Tensor, group: ProcessGroup, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduces `tensor` over the group in place (sum by default), and returns it. Not differentiable."""
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
    return tensor


def all_reduce_max(values: list[int], group: ProcessGroup) -> list[int]:
    """The largest of every rank's values, place by place; without cost for one rank."""
    if group.size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int32, device=current_device())
    return all_reduce_(tensor, group, dist.ReduceOp.MAX).tolist()
