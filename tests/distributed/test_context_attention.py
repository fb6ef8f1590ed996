"""Attention over Ulysses groups and a ring (DESIGN D6) against one process in fp64, its leaks, and what it sends."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from megatron_vlm.parallel import ring as ring_module
from megatron_vlm.parallel.ring import _TravellingGradients
from tests.helpers.attention_cases import (
    LENGTH,
    ROWS,
    Case,
    assembled,
    distance,
    expected,
    groups_of,
    local_results,
    masked_softmax,
    run_cases,
)
from tests.helpers.ranks import RankPool

LAYOUTS = [(ulysses, world // ulysses) for world in (2, 4, 8) for ulysses in (1, 2, 4, 8) if ulysses <= world]
HEADS = [(8, 8), (8, 2), (7, 1), (6, 3), (28, 4), (4, 4), (3, 3)]  # the last ones leave Ulysses ranks without a head
SAMPLE = [  # every head count, kind of row, mask and mode
    Case(8, 8),
    Case(8, 2, "packed"),
    Case(8, 2, "packed", mode="all_gather"),
    Case(7, 1, "length 1", causal=False),
    Case(6, 3, "spanning", window=5),
    Case(28, 4, "packed"),
    Case(4, 4, "whole", causal=False, window=19),
    Case(3, 3, "spanning", window=30),
    Case(3, 3, "spanning", window=30, mode="all_gather"),
    Case(8, 2, "packed", softcap=1.5, v_width=3),
]
EVERYTHING = [
    Case(heads, kv_heads, rows, causal, window, mode)
    for heads, kv_heads in HEADS
    for rows in ROWS
    for causal in (True, False)
    for window in (None, 5)
    for mode in ("p2p", "all_gather")
]


def check(ranks: RankPool, ulysses: int, ring: int, cases: list[Case]) -> None:
    """Every case's output and gradients, to 1e-5 of their norm. A ring of one has one mode."""
    cases = [case for case in cases if ring > 1 or case.mode == "p2p"]
    by_rank = ranks.run(ulysses * ring, run_cases, ulysses, ring, cases, timeout=280)
    for case, slices in zip(cases, zip(*by_rank, strict=True), strict=True):
        found = assembled(list(slices), case.layout(ulysses, ring))
        for name, wanted in expected(case).items():
            assert distance(found[name], wanted) < 1e-5, f"{name} of {case}"


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_it_is_the_attention_of_one_process(ranks: RankPool, ulysses: int, ring: int) -> None:
    check(ranks, ulysses, ring, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_every_case_is_the_attention_of_one_process(ranks: RankPool, ulysses: int, ring: int) -> None:
    check(ranks, ulysses, ring, EVERYTHING)


def test_one_rank_needs_no_ring(ranks: RankPool) -> None:
    check(ranks, 1, 1, SAMPLE)


def run_faulty(fault: str, ulysses: int, ring: int, case: Case) -> list[dict[str, Tensor]]:
    """`run_cases` with one line of the ring wrong."""

    def overwrite(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        out.copy_(block_out)
        lse.copy_(block_lse)

    def keep_out(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        merge(out, lse.clone(), block_out, block_lse)
        lse.copy_(block_lse)

    def wait_only(gradients: _TravellingGradients, under_way: Any) -> None:
        if under_way is not None:
            under_way[1].wait()

    merge = ring_module._merge
    faults = {
        "blocks overwrite": mock.patch.object(ring_module, "_merge", overwrite),
        "last block's lse": mock.patch.object(ring_module, "_merge", keep_out),
        "dk dropped": mock.patch.object(_TravellingGradients, "_take_in", wait_only),
    }
    with faults[fault]:
        return run_cases(ulysses, ring, [case])


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("blocks overwrite", {"out", "dq", "dk", "dv"}),
        ("last block's lse", {"out", "dq", "dk", "dv"}),
        ("dk dropped", {"dk", "dv"}),
    ],
)
def test_wrong_rings_are_noticed(ranks: RankPool, fault: str, wrong: set[str]) -> None:
    case = Case(4, 2)
    by_rank = ranks.run(4, run_faulty, fault, 1, 4, case)
    found = assembled([results[0] for results in by_rank], case.layout(1, 4))
    assert {name for name, wanted in expected(case).items() if distance(found[name], wanted) > 1e-2} == wrong


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 2), (1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_half_precision(ranks: RankPool, ulysses: int, ring: int, rows: str) -> None:
    """Errors are at most twice those of one process in the same precision."""
    case = Case(8, 2, rows, dtype=torch.bfloat16, width=16, v_width=16)
    slices = [results[0] for results in ranks.run(ulysses * ring, run_cases, ulysses, ring, [case])]
    found = assembled(slices, case.layout(ulysses, ring))
    alone = masked_softmax(case, case.inputs())
    for name, wanted in expected(case).items():
        assert found[name].dtype == torch.bfloat16
        assert distance(found[name], wanted) <= 2 * distance(alone[name], wanted), name


def run_changed(
    ulysses: int, ring: int, case: Case, tokens: list[int], losses: list[slice]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """This rank's results: plain and with a token of row 0 changed; with a loss on some tokens of row 0 only."""
    groups, inputs = groups_of(ulysses, ring), case.inputs()
    changed, partial = [inputs], []
    for token in tokens:
        changed.append({name: tensor.clone() for name, tensor in inputs.items()})
        for name in "qkv":
            changed[-1][name][0, token] = -7 * changed[-1][name][0, token] + 3
    for loss in losses:
        partial.append({**inputs, "dout": torch.zeros_like(inputs["dout"])})
        partial[-1]["dout"][0, loss] = inputs["dout"][0, loss]
    run = functools.partial(local_results, case, groups=groups, ulysses=ulysses, ring=ring)
    return list(map(run, changed)), list(map(run, partial))


def leaks(ranks: RankPool, ulysses: int, ring: int, case: Case, told_apart: Case) -> list[str]:
    """Outputs that change, and inputs that get a gradient, and should not for the documents of `told_apart`."""
    documents = told_apart.documents[0]
    tokens = [0, 1, 7, LENGTH // 2, LENGTH - 2]
    own = [documents.interval(documents.number(token)) for token in tokens]
    losses = [slice(document.start, document.stop) for document in own]
    by_rank = ranks.run(ulysses * ring, run_changed, ulysses, ring, case, tokens, losses)
    layout = case.layout(ulysses, ring)
    (plain, *changed), partial = (
        [assembled(list(slices), layout) for slices in zip(*runs, strict=True)] for runs in zip(*by_rank, strict=True)
    )
    found = []
    for token, loss, after, part in zip(tokens, losses, changed, partial, strict=True):
        differs = (plain["out"] != after["out"]).flatten(2).any(2)  # [b, L]
        assert differs[0, token], "the token itself"
        differs[0, token : loss.stop] = False
        found += [f"{token} -> {place}" for place in differs.nonzero().tolist()]
        for name in ("dq", "dk", "dv"):
            reached = part[name].flatten(2).ne(0).any(2)
            assert reached[0, loss].any() or loss.stop - loss.start == 1, name
            reached[0, loss] = False
            found += [f"{name} {place} of {loss}" for place in reached.nonzero().tolist()]
    return found


@pytest.mark.parametrize(
    ("ulysses", "ring", "mode"), [(1, 4, "p2p"), (2, 2, "p2p"), (4, 1, "p2p"), (1, 4, "all_gather")]
)
@pytest.mark.parametrize("rows", ["packed", "spanning"])
def test_nothing_leaks(ranks: RankPool, ulysses: int, ring: int, mode: str, rows: str) -> None:
    """Not one bit of an earlier token or another document changes, and no gradient gets there."""
    case = Case(4, 2, rows, mode=mode)
    assert leaks(ranks, ulysses, ring, case, case) == []


def test_leaks_are_noticed(ranks: RankPool) -> None:
    case = Case(4, 2, "packed")
    found = leaks(ranks, 1, 4, dataclasses.replace(case, causal=False), case)
    assert found and not any(line.startswith("d") for line in found)  # the future, but no other document
    found = leaks(ranks, 1, 4, dataclasses.replace(case, rows="whole"), case)
    assert any(line.startswith("dk") for line in found) and not all(line.startswith("d") for line in found)


def run_counted(ring: int, case: Case) -> tuple[dict[torch.dtype, int], str]:
    """(elements sent by precision, order of transfers T and attention calls A) of this rank."""
    sent = {torch.bfloat16: 0, torch.float32: 0}
    order: list[str] = []
    batch, attend = dist.batch_isend_irecv, ring_module.attention

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.isend:
                sent[operation.tensor.dtype] += operation.tensor.numel()
        order.append("T")
        return batch(operations)

    def noted(*arguments: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        order.append("A")
        return attend(*arguments, **options)

    with mock.patch.object(dist, "batch_isend_irecv", counted), mock.patch.object(ring_module, "attention", noted):
        run_cases(1, ring, [case])
    return sent, "".join(order)


def check_sent(ranks: RankPool, case: Case, keys_sent: list[int], keys_read: list[int]) -> list[str]:
    """Keys go in the inputs' precision, forward and again backward; their gradients in fp32, once; kv heads only."""
    of_key = case.kv_heads * (case.width + case.v_width)
    counted = ranks.run(len(keys_sent), run_counted, len(keys_sent), case)
    for (elements, _), sent, read in zip(counted, keys_sent, keys_read, strict=True):
        assert elements == {torch.bfloat16: 2 * sent * of_key, torch.float32: read * of_key}
    return [order for _, order in counted]


def test_keys_travel_to_their_readers(ranks: RankPool) -> None:
    """One document: a rank's first chunk goes to all others, its second to the ranks before it."""
    ring, case = 4, Case(8, 2, dtype=torch.bfloat16, v_width=3)
    of_chunk = len(case.documents) * LENGTH // (2 * ring)
    keys_sent = [of_chunk * (ring - 1 + rank) for rank in range(ring)]
    keys_read = [of_chunk * (ring - 1 + ring - 1 - rank) for rank in range(ring)]
    for order in check_sent(ranks, case, keys_sent, keys_read):
        assert order.startswith("TATATAA")  # the next step's keys travel while this step is computed


def test_keys_that_nobody_reads_stay(ranks: RankPool) -> None:
    alone = Case(4, 2, "length 1", window=1, dtype=torch.bfloat16)
    assert all(set(order) == {"A"} for order in check_sent(ranks, alone, [0] * 4, [0] * 4))
    # a window of 3: each chunk's last two keys, to the next chunk's rank unless it is the same one
    of_row = len(alone.documents) * 2
    windowed = Case(4, 2, "whole", window=3, dtype=torch.bfloat16)
    check_sent(ranks, windowed, [of_row, 2 * of_row, 2 * of_row, of_row], [of_row, 2 * of_row, 2 * of_row, of_row])
