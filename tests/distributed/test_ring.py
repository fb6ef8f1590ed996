"""What the ring holds while it computes, and what it leaves out: messages that are sent, and padding."""

import dataclasses
import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_vlm.parallel import ring as ring_module
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring import Ring, RingMode, ring_attention
from megatron_vlm.parallel.ring_plan import RingPlan
from tests.helpers.models.attention_cases import Case, assembled, run_cases
from tests.helpers.ranks.pool import RankPool

RING = 4
LENGTH = 48
PADDED = Documents.packed((5, 20, 9), LENGTH), Documents.packed((30,), LENGTH), Documents.packed((3, 45), LENGTH)


FORWARD, BACKWARD = "attention_into", "attention_into_backward"  # of blocks, as the ring calls them
PATIENCE_SECONDS = 2.0  # gloo's threads hold what they sent a moment longer than its receiver waits


def run_watched(mode: RingMode, allowed: dict[str, int]) -> dict[str, int]:
    """How many messages of this rank live at most, once they were handed over, when attention is computed."""
    messages: list[StorageWeakRef] = []
    most: dict[str, int] = {FORWARD: 0, BACKWARD: 0}

    def watch(*tensors: Tensor) -> None:
        messages.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    def counting(name: str) -> Any:
        compute = getattr(ring_module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            patient_until = time.monotonic() + PATIENCE_SECONDS
            while (alive := sum(not message.expired() for message in messages)) > allowed[name]:
                if time.monotonic() > patient_until:
                    break
                time.sleep(0.01)
            most[name] = max(most[name], alive)
            return compute(*arguments, **options)

        return mock.patch.object(ring_module, name, counted)

    send, gather = dist.batch_isend_irecv, dist.all_gather_into_tensor

    def watched_send(operations: list[dist.P2POp]) -> list[dist.Work]:
        watch(*(operation.tensor for operation in operations if operation.op is dist.isend))
        return send(operations)

    def watched_gather(output: Tensor, own: Tensor, **options: Any) -> None:
        watch(output, own)
        gather(output, own, **options)

    watched = {"batch_isend_irecv": watched_send, "all_gather_into_tensor": watched_gather}
    with mock.patch.multiple(dist, **watched), counting(FORWARD), counting(BACKWARD):
        run_cases(1, RING, [Case(4, 2, mode=mode)])
    assert messages
    return most


@pytest.mark.parametrize(
    ("mode", "most"),
    [
        ("p2p", {FORWARD: 1, BACKWARD: 2}),  # the next step's keys; the gradients of the step before
        ("all_gather", {FORWARD: 0, BACKWARD: 0}),  # all keys once, in global order
    ],
)
def test_messages_go_when_they_are_sent(ranks: RankPool, mode: RingMode, most: dict[str, int]) -> None:
    found = ranks.run(RING, run_watched, mode, most)
    assert {name: max(of_rank[name] for of_rank in found) for name in most} == most


def run_padded(documents: tuple[Documents, ...], mode: RingMode, in_padding: float) -> dict[str, Tensor]:
    """This rank's out, dq, dk and dv, where every input has the value `in_padding` in the padding of PADDED."""
    layout = SequenceLayout(LENGTH, dist.get_world_size())
    positions = layout.positions(dist.get_rank())
    q, k, v, dout = torch.randn(4, len(documents), LENGTH, 2, 4, generator=torch.Generator().manual_seed(0))
    for tensor in (q, k, v, dout):
        tensor[is_padding()] = in_padding
    leaves = [tensor[:, positions].clone().requires_grad_() for tensor in (q, k, v)]
    ring = Ring(RingPlan(layout, documents), dist.new_group(), mode)
    out = ring_attention(*leaves, ring, kv_index=(0, 1), softmax_scale=0.5)
    out.backward(dout[:, positions])
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}}


def is_padding() -> Tensor:
    """[b, L] bool, of PADDED."""
    padding = [row.padded & (row.numbers(torch.arange(LENGTH)) == len(row.starts) - 1) for row in PADDED]
    return torch.stack(padding)


@pytest.mark.parametrize(("ring", "mode"), [(1, "p2p"), (4, "p2p"), (4, "all_gather")])
def test_padding_is_left_out(ranks: RankPool, ring: int, mode: RingMode) -> None:
    """It is never read: nan there reaches nothing. What it gets is zero, and all else as if it were a document."""
    layout, padding = SequenceLayout(LENGTH, ring), is_padding()
    assert padding.any(1).tolist() == [True, True, False]
    found = assembled(ranks.run(ring, run_padded, PADDED, mode, float("nan")), layout)
    attended = tuple(dataclasses.replace(row, padded=False) for row in PADDED)
    wanted = assembled(ranks.run(ring, run_padded, attended, mode, 0.0), layout)
    for name, tensor in found.items():
        assert not tensor[padding].any(), name
        torch.testing.assert_close(tensor[~padding], wanted[name][~padding], msg=lambda text, name=name: name + text)
