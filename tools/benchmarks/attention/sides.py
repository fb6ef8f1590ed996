"""The real exchange under torchrun: our layouts and others' context parallelism, the same numbers, by turns.

A side counts where its output and its gradient of the queries are those of one process; what does not run, or answers
something else, is told with the reason. All ranks fail alike or the job hangs: the sides are called with the same sizes
everywhere, and whether one has failed is agreed on before its collectives are used again.

Letters: L tokens of the row, P ranks, U Ulysses ranks, R ring ranks, d head width.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_vlm.ops.attention import attention, attention_backward
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring import Ring
from megatron_vlm.parallel.ring_plan import RingPlan
from megatron_vlm.parallel.ulysses import HeadSplit
from megatron_vlm.runtime.collectives import all_gather_objects

from .names import PACKED, PRODUCT, WHOLE
from .turns import Seconds, Shape, attend, draw_documents, fastest

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # norm of the difference over the norm
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # a rank's q, k, v [1, L/P, heads or kv_heads, d] -> out


@dataclass(frozen=True)
class Side:
    """One way to attend over all ranks.

    Args:
        build: makes `Attend` for a row; imports and raises whatever it likes.
        around: entered with whole q, k, v, which it may cut in place; where it is None they are cut by `layout`.
        packed: whether it knows of documents.
    """

    name: str
    ulysses: int
    ring: int
    build: Callable[[Documents], Attend]
    around: Callable[[list[Tensor]], AbstractContextManager[Any]] | None = None
    packed: bool = False


def measure_sides(
    shape: Shape, num_ranks: int, lengths: Sequence[int], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a cell per length, kind of row and side; why a side has none). Every rank calls it."""
    world = dist.group.WORLD
    assert world is not None
    cells, reasons = [], dict[str, str]()
    sides = _sides(shape, num_ranks)
    for length in lengths:
        SequenceLayout(length, num_ranks, 1)
        for kind, documents in ((WHOLE, Documents.whole(length)), (PACKED, draw_documents(length))):
            inputs = _same_inputs(shape, length)
            wanted = _one_process(shape, inputs, documents)
            for side in sides:
                label = f"{side.name}, ulysses {side.ulysses} x ring {side.ring}"
                if label in reasons or (kind == PACKED and not side.packed):
                    continue
                found = _measure(shape, side, inputs, documents, wanted, rounds)
                by_rank = all_gather_objects(found, world)
                failed = [reason for reason in by_rank if isinstance(reason, str)]
                if failed:
                    reasons[label] = failed[0]
                    continue
                slowest = max((one for one in by_rank if isinstance(one, Seconds)), key=lambda one: one.both)
                cells.append(
                    {
                        "side": side.name,
                        "tokens": length,
                        "rows": kind,
                        "documents": len(documents.starts),
                        "ulysses": side.ulysses,
                        "ring": side.ring,
                        "slowest_rank_seconds": vars(slowest),
                    }
                )
    return cells, reasons


def _same_inputs(shape: Shape, length: int) -> list[Tensor]:
    """Whole q, k, v and dout, equal on all ranks."""
    torch.manual_seed(length)
    return [tensor.detach() for tensor in shape.inputs(length)]


def _one_process(shape: Shape, inputs: list[Tensor], documents: Documents) -> tuple[Tensor, Tensor]:
    """(out, dq) of whole rows."""
    q, k, v, dout = inputs
    out, dq = torch.empty_like(dout), torch.empty_like(q)
    for number in range(len(documents.starts)):
        document = documents.interval(number)
        at = slice(document.start, document.stop)
        rules: Any = {"causal": True, "softmax_scale": shape.scale, "backend": shape.backend}
        part, lse = attention(q[:, at], k[:, at], v[:, at], **rules)
        out[:, at] = part
        dq[:, at] = attention_backward(dout[:, at], q[:, at], k[:, at], v[:, at], part, lse, **rules)[0].to(q.dtype)
    return out, dq


def _measure(
    shape: Shape,
    side: Side,
    inputs: list[Tensor],
    documents: Documents,
    wanted: tuple[Tensor, Tensor],
    rounds: int,
) -> Seconds | str:
    """This rank's fastest round, or why there is none."""
    layout = SequenceLayout(documents.length, side.ring, side.ulysses)
    rank = dist.get_rank()
    positions = layout.positions(rank // side.ulysses, rank % side.ulysses).to(shape.device)
    times = []
    try:
        run = side.build(documents)
        for _ in range(rounds + 1):
            out, dq, seconds = _round(shape, side, run, inputs, positions)
            times.append(seconds)
    except Exception as error:  # others' code may fail in any way, and our own comparison goes on without it
        if side.name == PRODUCT:
            raise
        return f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for name, found, whole in (("output", out, wanted[0]), ("gradient of the queries", dq, wanted[1])):
        right = whole[:, positions]
        if not float((found - right).norm() / right.norm()) <= TOLERANCE[shape.dtype]:
            return f"has another {name} than one process"
    return fastest(times[1:])


def _round(
    shape: Shape, side: Side, run: Attend, inputs: list[Tensor], positions: Tensor
) -> tuple[Tensor, Tensor, Seconds]:
    """(out, dq, seconds) of one forward and backward pass that all ranks start together."""
    *qkv, dout = inputs
    local = [x.clone() if side.around else x[:, positions].clone() for x in qkv]
    with side.around(local) if side.around else nullcontext():
        leaves = [x.requires_grad_() for x in local]
        started = _together(shape)
        out = run(*leaves)
        middle = _now(shape)
        gradients = torch.autograd.grad(out, leaves, dout[:, positions])
        return out.detach(), gradients[0], Seconds(middle - started, _now(shape) - middle)


def _together(shape: Shape) -> float:
    dist.barrier()
    return _now(shape)


def _now(shape: Shape) -> float:
    if shape.device.type == "cuda":
        torch.cuda.synchronize(shape.device)
    return time.perf_counter()


def _sides(shape: Shape, num_ranks: int) -> list[Side]:
    ours = [_ours(shape, u, num_ranks // u) for u in range(1, num_ranks + 1) if num_ranks % u == 0]
    return [
        *ours,
        _torch(shape, num_ranks),
        Side("yunchang", num_ranks, 1, lambda _: _yunchang_ulysses(shape, num_ranks)),
        Side("yunchang", 1, num_ranks, lambda _: _yunchang_ring(shape, num_ranks)),
        Side("ring-flash-attn", 1, num_ranks, lambda _: _ring_flash_attn()),
    ]


def _ours(shape: Shape, ulysses: int, ring: int) -> Side:
    rows = [dist.new_group([r * ulysses + u for u in range(ulysses)]) for r in range(ring)]
    columns = [dist.new_group([r * ulysses + u for r in range(ring)]) for u in range(ulysses)]
    rank = dist.get_rank()
    groups: tuple[ProcessGroup, ProcessGroup] = rows[rank // ulysses], columns[rank % ulysses]
    split = HeadSplit(shape.heads, shape.kv_heads, ulysses)

    def build(documents: Documents) -> Attend:
        plan = RingPlan(SequenceLayout(documents.length, ring, ulysses), (documents,))
        of_ring = Ring(plan, groups[1])
        return lambda q, k, v: attend(q, k, v, shape, split, of_ring, groups[0])

    return Side(PRODUCT, ulysses, ring, build, packed=True)


def _torch(shape: Shape, num_ranks: int) -> Side:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(shape.device.type, (num_ranks,))

    def around(whole: list[Tensor]) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = context_parallel(
            mesh, buffers=whole, buffer_seq_dims=[1] * len(whole), no_restore_buffers=set(whole)
        )
        return context

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, *_repeated(shape, k, v)))  # [1, s, heads, d] -> [1, heads, s, d]
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale).transpose(1, 2)

    return Side("torch context_parallel", 1, num_ranks, lambda _: run, around)


def _repeated(shape: Shape, *tensors: Tensor) -> list[Tensor]:
    """[1, s, kv_heads, d] -> [1, s, heads, d], for who does not group queries."""
    return [x.repeat_interleave(shape.heads // shape.kv_heads, dim=2) for x in tensors]


def _yunchang_ulysses(shape: Shape, num_ranks: int) -> Attend:
    yunchang = _yunchang(shape, num_ranks, 1)
    layer = yunchang.UlyssesAttention(dist.group.WORLD)
    return lambda q, k, v: layer(q, *_repeated(shape, k, v), softmax_scale=shape.scale, causal=True)


def _yunchang_ring(shape: Shape, num_ranks: int) -> Attend:
    yunchang = _yunchang(shape, 1, num_ranks)
    layer = yunchang.LongContextAttention(ring_impl_type="zigzag")
    return lambda q, k, v: layer(q, *_repeated(shape, k, v), softmax_scale=shape.scale, causal=True)


def _yunchang(shape: Shape, ulysses: int, ring: int) -> Any:
    if shape.device.type == "cpu":  # asked all the same, one rank fails within an exchange and the other waits
        raise RuntimeError("its kernels (0.6.4) need CUDA, forward or backward")
    yunchang = importlib.import_module("yunchang")
    yunchang.set_seq_parallel_pg(ulysses, ring, dist.get_rank(), ulysses * ring)
    return yunchang


def _ring_flash_attn() -> Attend:
    attend_zigzag = importlib.import_module("ring_flash_attn").zigzag_ring_flash_attn_func
    return lambda q, k, v: attend_zigzag(q, k, v, causal=True, group=dist.group.WORLD)
