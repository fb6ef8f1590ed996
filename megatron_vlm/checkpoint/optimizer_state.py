"""The optimizer's sharded state: every rank saves what it holds and loads what it needs, in place.

The distributed optimizer gives each rank a range of a parameter's flattened elements. A checkpoint is made of boxes,
rectangular blocks of global tensors, and a range is a few of them: the end of a row, whole rows, the start of a row.
So the states are saved without being moved, and any layout reads them, as megatron-core's fully reshardable format has
it, with the same names and shapes. Its own way there is to gather all states on every rank first: eight times the
parameters' memory for a moment, and from the second bucket on from wrong places (megatron-core 0.16 counts the padding
between buckets that it has left out; NVIDIA/Megatron-LM pull request 5077).

Hazard: loading fills the optimizer's own tensors; what fails halfway leaves them half filled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size along each dimension


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, weights: dict[str, Any], is_loading: bool = False
) -> dict[int, Any]:
    """The optimizer's part of a checkpoint, by place in the chain.

    Args:
        optimizer: of all components.
        weights: the models' sharded state.
        is_loading: the state is only to be filled.
    """
    places = {id(place.data): place for place in nested_values(weights) if hasattr(place, "data")}
    state = {}
    for number, part in enumerate(optimizer.chained_optimizers):
        if not isinstance(part, DistributedOptimizer):
            state[number] = part.sharded_state_dict(weights, is_loading=is_loading)
            continue
        if is_loading:
            part.load_state_dict(part.state_dict())  # allocates what is to be filled
        state[number] = {**part.state_dict(), "own": dict(_own_boxes(part, places))}
    return state


def load_optimizer_state(optimizer: ChainedOptimizer, state: dict[int, Any]) -> None:
    """Takes over a loaded state: for sharded states the parameter groups, the rest is filled already."""
    for number, part in enumerate(optimizer.chained_optimizers):
        state[number].pop("own", None)
        part.load_state_dict(state[number])


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Elements start ... end-1 of a flattened tensor as blocks of it, in order."""
    if start >= end:
        return
    if len(shape) < 2:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows: first ... last-1
    if first > last:  # inside one row
        yield from _in_row(last, shape, start - last * row, end - last * row)
        return
    yield from _in_row(first - 1, shape, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(last, shape, 0, end - last * row)


def _in_row(number: int, shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, end):
        yield (number, *offset), (1, *size)


def _own_boxes(optimizer: DistributedOptimizer, places: dict[int, Any]) -> Iterator[tuple[str, ShardedTensor]]:
    """This rank's master weights and moments as views, each with its place in the global tensor."""
    for of_buffer in optimizer.gbuf_ranges:
        for of_type in of_buffer.values():
            for of_bucket in of_type:
                for parameter, ranges in of_bucket["param_map"].items():
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    states.pop("step", None)
                    for whole, first in _whole_tensors(places[id(parameter)]):
                        start = max(ranges["param"].start, first)
                        end = min(ranges["param"].end, first + whole.data.numel())
                        for name, flat in states.items():
                            own = flat.detach()[start - ranges["param"].start : max(start, end) - ranges["param"].start]
                            yield from _placed(name, whole, own, boxes(whole.local_shape, start - first, end - first))


def _whole_tensors(place: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The global tensors that a parameter is stored as (a gated layer's as two), and where each begins in it."""
    if isinstance(place, ShardedTensor):
        yield place, 0
        return
    empty = torch.empty(place.data.shape, dtype=place.data.dtype, device="meta")
    for part in nested_values({"parts": replace(place, data=empty).build()}):
        assert part.data.is_contiguous(), f"{part.key} is stored in pieces that are no ranges of it"
        yield part, part.data.storage_offset()


def _placed(
    name: str, whole: ShardedTensor, own: torch.Tensor, blocks: Iterator[Box]
) -> Iterator[tuple[str, ShardedTensor]]:
    """`own`, the flattened blocks one after another, as parts of the global tensor of this state."""
    assert whole.prepend_axis_num == 0, f"{whole.key} has axes of its own in the checkpoint"
    key, position = f"optimizer.state.{name}.{whole.key}", 0
    replica = whole.replica_id  # the last place counts data-parallel copies; of this state there is one
    for offset, size in blocks:
        data = own[position : position + prod(size)].view(size)
        position += data.numel()
        place = tuple(a + b for a, b in zip(whole.global_offset, offset, strict=True))
        yield (
            f"{key}.{'.'.join(map(str, place))}",
            replace(
                whole,
                key=key,
                data=data,
                dtype=data.dtype,
                local_shape=size,
                global_offset=place,
                axis_fragmentations=None,  # blocks of any size
                replica_id=(*replica[:-1], 0) if isinstance(replica, tuple) else 0,
            ),
        )
