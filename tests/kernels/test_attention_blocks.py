"""Blocks folded in place by the Triton kernel against one call: key blocks, packed documents, the ranks of a ring."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops.attention_blocks import (
    Rectangle,
    Rectangles,
    SavedForward,
    Scoring,
    attention_into,
    attention_into_backward,
)
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring_plan import RingPlan
from tests.helpers.data.packed import visible
from tests.helpers.models.plain_attention import SCALE, draw, finite, plain
from tests.helpers.quick_interpreter import quick_interpreter
from tests.helpers.ranks.ring_in_turn import ring_in_turn
from tests.kernels.accuracy import assert_as_exact
from tools.benchmarks.kernels.case import Draw
from tools.benchmarks.kernels.cases_attention import RING_CASE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """Under the interpreter each operation takes half a millisecond."""
    with quick_interpreter():
        yield


LENGTH = 48
PACKED = Documents((0, 1, 2, 20, 21, 47), LENGTH), Documents.packed((30, 7), LENGTH)  # the latter ends with padding
Step = tuple[Rectangles, slice]


def summed(tensors: dict[str, Tensor], steps: list[Step], backend: str, softcap: float | None) -> dict[str, Tensor]:
    """out, lse and gradients over steps of (rectangles, which keys they are of)."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    scoring = Scoring(SCALE, softcap, backend)
    out = torch.zeros(dout.shape, device=q.device)
    lse = torch.full((len(q), q.shape[2], q.shape[1]), -torch.inf, device=q.device)
    dq, dk, dv = (torch.zeros(x.shape, device=q.device) for x in (q, k, v))
    for rectangles, at in steps:
        attention_into(q, k[:, at], v[:, at], (out, lse), rectangles, scoring)
    saved = SavedForward(dout, q, out.to(q.dtype), lse)
    for rectangles, at in steps:
        attention_into_backward(saved, k[:, at], v[:, at], (dq, dk[:, at], dv[:, at]), rectangles, scoring)
    return finite({"out": out.to(q.dtype), "lse": lse, "dq": dq, "dk": dk, "dv": dv})


def both_sides(tensors: dict[str, Tensor], seen: Tensor, softcap: float | None = None) -> list[dict[str, Tensor]]:
    """(plain torch in the dtype, exact); `seen` [b or 1, 1, sq, sk]."""
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    return [plain(one, seen.to(one["q"].device), softcap) for one in (tensors, doubles)]


def three_blocks(num_queries: int, cut: tuple[int, ...]) -> list[Step]:
    """Causal attention of a square in blocks of keys, each with the queries that see any of it."""
    steps, start = [], 0
    for size in cut:
        rectangle = Rectangle((0, 2), (start, num_queries), (0, size), causal=True, offset=0)
        steps.append((Rectangles((rectangle,)), slice(start, start + size)))
        start += size
    return steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_key_blocks_fold_into_one_call(softcap: float | None, dtype: torch.dtype, device: str) -> None:
    tensors = draw((36, 36), (2, 1), (16, 8), device, dtype)
    seen = torch.ones(36, 36).tril().bool()[None, None]
    found = summed(tensors, three_blocks(36, (5, 20, 11)), "triton", softcap)
    assert_as_exact(found, *both_sides(tensors, seen, softcap))


def test_fp16(device: str) -> None:
    tensors = draw((36, 36), (2, 1), (16, 8), device, torch.float16)
    seen = torch.ones(36, 36).tril().bool()[None, None]
    assert_as_exact(summed(tensors, three_blocks(36, (5, 20, 11)), "triton", 1.5), *both_sides(tensors, seen, 1.5))


def documents_of(documents: tuple[Documents, ...]) -> Rectangles:
    """Every document of every row a square."""
    found = []
    for row, of_row in enumerate(documents):
        for number in range(len(of_row.starts) - of_row.padded):
            at = of_row.interval(number)
            found.append(Rectangle((row, row + 1), (at.start, at.stop), (at.start, at.stop), causal=True, offset=0))
    return Rectangles(tuple(found))


def seen_in(documents: tuple[Documents, ...], causal: bool = True, window: int | None = None) -> Tensor:
    """[b, 1, L, L] bool."""
    return torch.stack([visible(of_row, causal, window) for of_row in documents])[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_are_one_launch(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of one token and padding among them; each kernel is launched once."""
    from megatron_vlm_kernels import attention, attention_backward

    counted: list[int] = []
    original = attention.launches

    def counting(*arguments: Any) -> Any:
        counted.append(len(found := original(*arguments)))
        return found

    monkeypatch.setattr(attention, "launches", counting)
    monkeypatch.setattr(attention_backward, "launches", counting)
    tensors = draw((LENGTH, LENGTH), (2, 1), (16, 16), device, dtype)
    found = summed(tensors, [(documents_of(PACKED), slice(None))], "triton", None)
    assert counted == [1, 1, 1]  # forward; dk and dv; dq
    assert_as_exact(found, *both_sides(tensors, seen_in(PACKED)))


def test_rectangles_that_meet_are_apart(device: str) -> None:
    """Two rectangles of the same queries, two of the same keys: launches of their own, the same sums."""
    tensors = draw((20, 20), (2, 1), (16, 16), device, torch.float32)
    halves = [(0, 9), (9, 20)]
    four = [Rectangle((0, 2), queries, keys, causal=False, offset=0) for queries in halves for keys in halves]
    found = summed(tensors, [(Rectangles(tuple(four)), slice(None))], "triton", None)
    assert_as_exact(found, *both_sides(tensors, torch.ones(1, 1, 20, 20).bool()))


RINGS = [
    (2, (Documents.whole(LENGTH),) * 2, True, None),
    (4, PACKED, True, None),
    (2, PACKED, False, 9),
    pytest.param(4, (Documents.whole(LENGTH), PACKED[0]), True, 19, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ring", "documents", "causal", "window"), RINGS)
def test_the_ranks_of_a_ring(
    ring: int, documents: tuple[Documents, ...], causal: bool, window: int | None, device: str
) -> None:
    """As `parallel.ring` computes, messages included; rows with documents of their own."""
    tensors = draw((LENGTH, LENGTH), (2, 1), (16, 8), device, torch.float32)
    plan = RingPlan(SequenceLayout(LENGTH, ring), documents, causal, window)
    found = ring_in_turn(tensors, plan, Scoring(SCALE, None, "triton"))
    found["lse"] = found["lse"].transpose(1, 2)
    assert_as_exact(finite(found), *both_sides(tensors, seen_in(documents, causal, window)))


@pytest.mark.slow
def test_the_benchmark_compares_like_with_like(device: str) -> None:
    """Its sides, the kernels and calls with a merge, give the same numbers."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = RING_CASE.draw(RING_CASE.tiny[0], Draw(torch.device(device), torch.float32, generator))
    assert RING_CASE.backward is not None
    sides = []
    for backend in ("triton", "calls"):
        outputs = RING_CASE.call(inputs, backend)
        gradients = RING_CASE.backward(backend)(inputs, outputs, (torch.ones_like(outputs[0]),))
        sides.append([*outputs, *gradients])
    torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-5)
    forward, backward = RING_CASE.work(RING_CASE.sizes[0], 2)
    assert forward.num_bytes > 0 and backward.flops * 2 == forward.flops * 5


def towards_the_first(one: Any) -> Any:
    """A document's rectangle with the keys of all before it in its row."""
    return one._replace(first_key=0, num_keys=one.first_key + one.num_keys, upper=one.upper + one.first_key)


@pytest.mark.parametrize("fault", ["overwrites", "documents see each other", "last block's lse"])
def test_wrong_sums_are_noticed(fault: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm_kernels import attention as kernels
    from megatron_vlm_kernels import attention_tiles as tiles

    right_list = tiles.RectangleList
    tensors = draw((20, 20), (2, 1), (16, 16), device, torch.float32)
    steps, seen = three_blocks(20, (7, 13)), torch.ones(1, 1, 20, 20).tril().bool()
    expected = both_sides(tensors, seen)
    assert_as_exact(summed(tensors, steps, "triton", None), *expected)
    original = kernels.attention_into
    if fault == "overwrites":

        def overwrite(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Any) -> None:
            kernels._launch(q, k, v, out, lse, rules, into=False)

        monkeypatch.setattr(kernels, "attention_into", overwrite)
    elif fault == "last block's lse":

        def forget(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Any) -> None:
            alone, own = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
            original(q, k, v, alone, own, rules)
            original(q, k, v, out, lse, rules)
            lse.copy_(torch.where(own == -torch.inf, lse, own))

        monkeypatch.setattr(kernels, "attention_into", forget)
    else:
        steps = [(documents_of(documents := (Documents((0, 7), 20),) * 2), slice(None))]
        expected = both_sides(tensors, seen_in(documents))
        assert_as_exact(summed(tensors, steps, "triton", None), *expected)
        monkeypatch.setattr(tiles, "RectangleList", lambda found: right_list([towards_the_first(x) for x in found]))
        steps = [(documents_of(documents), slice(None))]
    with pytest.raises(AssertionError, match="error"):
        assert_as_exact(summed(tensors, steps, "triton", None), *expected)
