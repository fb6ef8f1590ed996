"""The peak a GPU's name stands for, and one that is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vlm.planner import peak
from megatron_vlm.planner.peak import by_data_sheet, measure
from megatron_vlm.runtime.environment import num_cores


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA L40S", 362, 91.6),
    ],
)
def test_known_gpus(name: str, bf16: float, fp32: float) -> None:
    assert by_data_sheet(name, torch.bfloat16) == pytest.approx(bf16 * 1e12)
    assert by_data_sheet(name, torch.float32) == pytest.approx(fp32 * 1e12)


@pytest.mark.parametrize("name", ["CPU", "NVIDIA L40", "NVIDIA A10", "NVIDIA A1000", "Some H1000"])
def test_unknown_devices_are_not_taken_for_known_ones(name: str) -> None:
    assert by_data_sheet(name, torch.bfloat16) is None


def test_a_measured_peak_is_what_this_machine_does() -> None:
    """Between a thousandth and a hundred TFLOP/s: a unit wrong by 10^3 may show."""
    assert 1e9 < measure(torch.float32, torch.device("cpu"), seconds=0.05) < 1e14


def test_other_work_on_the_machine_does_not_lower_the_peak() -> None:
    """With eight busy processes beside it, a wall clock would give a fraction."""
    cpu = torch.device("cpu")
    alone = max(measure(torch.float32, cpu) for _ in range(3))
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * num_cores())]
    try:
        busy = max(measure(torch.float32, cpu) for _ in range(3))
    finally:
        for process in beside:
            process.kill()
            process.wait()
    assert busy > alone / 2


def test_ranks_that_share_cores_share_the_peak() -> None:
    cpu, ranks = torch.device("cpu"), 8 * num_cores()
    assert measure(torch.float32, cpu, ranks) < measure(torch.float32, cpu) / 2


def test_measuring_draws_no_random_number() -> None:
    """It runs after a resumed run has its random states back."""
    before = torch.get_rng_state()
    measure(torch.float32, torch.device("cpu"), seconds=0.01)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One rank, a cache of its own; returns the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peak, "all_gather_objects", lambda value, group: [value])
    monkeypatch.setattr(peak, "current_device", lambda: torch.device("cpu"))
    return tmp_path / "megatron_vlm" / peak.KEPT


class OneRank:
    def rank(self) -> int:
        return 0


def test_what_was_measured_is_kept(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy moment later changes nothing; other ranks, threads or numbers are others."""
    rates = iter([5e10, 4e10, 3e10])
    monkeypatch.setattr(peak, "measure", lambda dtype, device, ranks: next(rates))
    found = [peak.peak_of_ranks(torch.float32, OneRank(), ranks) for ranks in (1, 1, 2, 1, 2)]
    assert [one.flops_per_second for one in found] == [5e10, 5e10, 4e10, 5e10, 4e10]
    assert peak.peak_of_ranks(torch.bfloat16, OneRank(), 1).flops_per_second == 3e10
    assert str(alone) in found[0].source and len(json.loads(alone.read_text())) == 3
    assert [path.name for path in alone.parent.iterdir()] == [peak.KEPT]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "x"}', "[" * 100_000, '{"a": -1.0, "b": NaN, "c": true}'])
def test_a_damaged_file_is_measured_anew(alone: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    alone.parent.mkdir()
    alone.write_text(content)
    assert peak.kept(alone) == {}
    monkeypatch.setattr(peak, "measure", lambda dtype, device, ranks: 2e10)
    assert peak.peak_of_ranks(torch.float32, OneRank(), 1).flops_per_second == 2e10
    assert list(peak.kept(alone).values()) == [2e10]


def test_a_cache_that_cannot_be_written_costs_no_run(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.parent.write_text("a file in the folder's place")
    monkeypatch.setattr(peak, "measure", lambda dtype, device, ranks: 2e10)
    assert peak.peak_of_ranks(torch.float32, OneRank(), 1).flops_per_second == 2e10


def test_one_rank_that_is_new_has_all_measure_again(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of ranks that share cores is one of all at work."""
    monkeypatch.setattr(peak, "measure", lambda dtype, device, ranks: 2e10)
    peak.peak_of_ranks(torch.float32, OneRank(), 2)
    answers = iter([[2e10, None], [1e10, 1e10]])
    monkeypatch.setattr(peak, "all_gather_objects", lambda value, group: next(answers))
    monkeypatch.setattr(peak, "measure", lambda dtype, device, ranks: 1e10)
    assert peak.peak_of_ranks(torch.float32, OneRank(), 2).flops_per_second == 2e10
    assert list(peak.kept(alone).values()) == [1e10]
