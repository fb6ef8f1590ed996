"""tools/bench.py attention on real processes: ranks in turn, ranks that exchange, and bad input."""

import json
from pathlib import Path

import pytest
import torch

from megatron_vlm.parallel.layout import Documents, SequenceLayout
from tests.helpers.ranks.tool_runs import tool, tool_on_ranks, warm_tool
from tools.benchmarks.attention import results
from tools.benchmarks.attention.command import OTHERS
from tools.benchmarks.attention.names import EXCHANGE, PACKED, TURNS, WHOLE
from tools.benchmarks.attention.turns import Shape, draw_documents, in_turn, single_device

SMALL = ["--lengths", "64", "128", "--heads", "6", "--kv-heads", "3", "--width", "8", "--rounds", "1"]


def test_a_drawn_row_is_full_and_its_documents_differ() -> None:
    for length in (64, 4096):
        documents = draw_documents(length)
        sizes = [len(documents.interval(number)) for number in range(len(documents.starts))]
        assert sum(sizes) == length and len(set(sizes)) > 3 and max(sizes) <= length // 4


def test_a_ring_sends_no_more_than_its_documents_need() -> None:
    """And the time of one device is taken of the same row."""
    shape = Shape(2, 1, 8, torch.float32, torch.device("cpu"))
    layout = SequenceLayout(256, 4)
    whole, apart = Documents.whole(256), Documents(tuple(range(0, 256, 32)), 256)  # chunks of 32: none reaches another
    assert sum(one.sent_forward_bytes for one in in_turn(shape, layout, whole, 1)) > 0
    assert sum(one.sent_backward_bytes for one in in_turn(shape, layout, apart, 1)) == 0
    assert single_device(shape, apart, 2).both > 0


def test_the_ratio_is_of_the_fastest() -> None:
    def cell(side: str, tokens: int, seconds: float, kind: str = WHOLE) -> dict:
        return {
            "side": side,
            "tokens": tokens,
            "rows": kind,
            "slowest_rank_seconds": {"forward": seconds, "backward": 0},
        }

    cells = [cell("megatron_vlm", 8, 2.0), cell("megatron_vlm", 8, 1.0), cell("megatron_vlm", 8, 0.1, PACKED)]
    assert results.summary({"measured": EXCHANGE, "cells": cells}) == {"ratio": None}
    cells += [cell("yunchang", 8, 1.5), cell("yunchang", 8, 3.0), cell("megatron_vlm", 16, 1.0)]
    assert results.summary({"measured": EXCHANGE, "cells": cells}) == {"ratio": 1.5}


def test_heads_that_do_not_divide_cost_one_line() -> None:
    done = warm_tool("bench.py", "attention", "--heads", "8", "--kv-heads", "3")
    assert (done.code, done.stderr) == (1, "error: --kv-heads: found 3, needs a divisor of --heads 8\n")


@pytest.mark.slow
def test_ranks_in_turn(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.json", "out.png", "out.md")]
    done = tool("bench.py", "attention", *SMALL, "--ranks", "2", "4", "--device", "cpu",
                "--json", files[0], "--png", files[1], "--markdown", files[2])  # fmt: skip
    assert done.code == 0 and done.stderr == "", done.stderr
    found = json.loads(files[0].read_text())
    assert {"date", "commit", "command", "machine", "versions"} <= found.keys() and found["measured"] == TURNS
    assert len(found["cells"]) == 2 * 2 * (2 + 3) and found["others"].keys() == set(OTHERS)
    for cell in found["cells"]:
        num_ranks = cell["ulysses"] * cell["ring"]
        slowest = max(sum(rank["seconds"].values()) for rank in cell["ranks"])
        ideal = sum(cell["single_device_seconds"].values())
        assert len(cell["ranks"]) == num_ranks and slowest == pytest.approx(sum(cell["slowest_rank_seconds"].values()))
        assert cell["share_of_ideal"] == pytest.approx(ideal / (slowest * num_ranks))
        assert cell["imbalance_of_pairs"] >= 1
        pure_ring = cell["rows"] == WHOLE and cell["ulysses"] == 1
        assert not pure_ring or cell["imbalance_of_pairs"] < 1.001  # zigzag
    assert "the network is not included" in done.stdout and files[1].stat().st_size > 10_000
    assert found["command"] in files[2].read_text()


@pytest.mark.slow
def test_ranks_that_exchange_answer_like_one_process(tmp_path: Path) -> None:
    """Ours in every layout; each other is measured or its reason told."""
    options = [*SMALL, "--device", "cpu", "--json", tmp_path / "out.json"]
    done = tool_on_ranks(2, tmp_path / "logs", "bench.py", "attention", *options)
    assert done.code == 0 and done.stderr == "", done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    ours = [(c["tokens"], c["rows"], c["ulysses"]) for c in found["cells"] if c["side"] == "megatron_vlm"]
    assert sorted(ours) == sorted((n, kind, u) for n in (64, 128) for kind in (WHOLE, PACKED) for u in (1, 2))
    told = {name.split(",")[0] for name in found["others"]} | {cell["side"] for cell in found["cells"]}
    assert set(OTHERS) <= told
