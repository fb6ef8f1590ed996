"""Feature rows to the owners of their tokens, and gradients back (DESIGN D3): one uneven all-to-all each way.

The plan says what goes where; here it is only carried out. Features end as leaves on stage 0, so neither direction is
part of an autograd graph. A rank that encoded nothing, or owns no image's token, takes part all the same: a
collective that it skips hangs the others.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vlm.parallel.groups import Grid
from megatron_vlm.parallel.media_plan import Route
from megatron_vlm.runtime.collectives import all_to_all_rows


def media_group(grid: Grid, over_world: bool) -> ProcessGroup:
    """The ranks that a plan or route shares the encoding out to; a rank's number in it is `MediaPlan.media_rank`."""
    return grid.world if over_world else grid.replica


@torch.no_grad()
def send_features(encoded: Tensor, route: Route, group: ProcessGroup) -> Tensor:
    """Sends this rank's encoded rows to their owners.

    Args:
        encoded: [n_encoded, h], this rank's items in ascending item order; [0, h] of the same dtype without any.
        route: this rank's.
        group: the media group (`media_group`).

    Returns:
        [n_recv, h], placed by the route's `micro_batch`, `row` and `position`.
    """
    rows = encoded[route.send_rows.to(encoded.device, non_blocking=True)]  # [n_encoded, h] -> [n_send, h]
    return all_to_all_rows(rows, route.send_splits, route.recv_splits, group)


@torch.no_grad()
def return_gradients(grads: Tensor, route: Route, num_encoded_rows: int, group: ProcessGroup) -> Tensor:
    """Sends the gradients of received rows back to the ranks that encoded them.

    Args:
        grads: [n_recv, h], in the order of `send_features`' result.
        route: the one the features took.
        num_encoded_rows: rows this rank encoded.
        group: the media group.

    Returns:
        [n_encoded, h], every row set exactly once.
    """
    assert len(route.grad_rows) == num_encoded_rows, f"{len(route.grad_rows)} gradients for {num_encoded_rows} rows"
    rows = grads[route.grad_send_rows.to(grads.device, non_blocking=True)]  # [n_recv, h] -> [n_grad_send, h]
    received = all_to_all_rows(rows, route.grad_send_splits, route.grad_recv_splits, group)
    returned = torch.empty_like(received)
    returned[route.grad_rows.to(grads.device, non_blocking=True)] = received  # order of arrival -> encoded order
    return returned
