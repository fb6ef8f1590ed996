"""Probes of the machine: limits below what training needs are told, and nothing that fails takes the prober with it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlm.runtime import environment


def findings() -> dict[str, environment.Finding]:
    return {one.name: one for one in environment.machine()}


def test_the_control_group_limits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = environment.memory_bytes()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(environment, "MEMORY_LIMIT_FILE", limit)
    for text, expected in (("max\n", whole), (str(2**30), 2**30)):
        limit.write_text(text)
        assert environment.memory_bytes() == min(whole, expected)


def test_little_shared_memory_is_told_with_the_option_that_gives_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings()["/dev/shm"].state in ("ok", "note")
    small = shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    assert findings()["/dev/shm"].state == "note" and "--shm-size" in findings()["/dev/shm"].advice


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new" / "cache"))
    assert findings()["model cache"].state == "ok" and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "cache"))
    assert findings()["model cache"].state == "note"


def test_two_processes_meet() -> None:
    assert environment.meeting("gloo", 2).state == "ok"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The processes at work in the last minute, as the machine says."""
    at_work = [0.5]
    monkeypatch.setattr(os, "getloadavg", lambda: (at_work[0], 0.0, 0.0))
    yield at_work


def test_what_is_late_on_a_busy_machine_is_not_broken(load: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CHILD_SECONDS", 0.05)
    idle = environment.meeting("gloo", 2, limit_seconds=0.05), *environment.accelerators()[0]
    assert [one.state for one in idle] == ["broken", "broken"]
    load[0] = 1000.0
    busy = environment.meeting("gloo", 2, limit_seconds=0.05), *environment.accelerators()[0]
    assert [one.state for one in busy] == ["note", "note"]
    assert all("the machine is busy: 1000.0 processes running" in one.value for one in busy)
    assert findings()["load"].state == "note" and "1000.0 processes running" in findings()["load"].value


def test_processes_that_do_not_meet_are_told_and_ended(load: list[float]) -> None:
    assert environment.meeting("gloo", 2, limit_seconds=0.05).value == "did not meet within 0 s"
    failed = environment.meeting("no_backend", 1)
    assert failed.state == "broken" and "no_backend" in failed.value


def test_imports_that_fail_are_told_by_their_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "IMPORTS", "import sys; sys.exit('libnccl.so.2: not found')")
    found, num_gpus = environment.accelerators()
    assert [(one.state, one.value) for one in found] == [("broken", "libnccl.so.2: not found")] and num_gpus == 0


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"cuda": "13.0", "gpus": ["H200, 140 GiB, sm_90"], "nccl": "2.28.9", "fused_adam": "transformer_engine"}
    monkeypatch.setattr(environment, "IMPORTS", f"import json; print(json.dumps({facts!r}))")
    found, num_gpus = environment.accelerators()
    assert num_gpus == 1 and [one.name for one in found] == ["imports", "GPU 0", "CUDA"]
    assert "transformer_engine" in found[0].value and "NCCL 2.28.9" in found[2].value


def test_launcher_variables_are_seen_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "VILA_SLURM_ACCOUNT", "NCCL_DEBUG", "SECRET_TOKEN"):
        monkeypatch.setenv(name, "7")
    seen = environment.launcher_variables()
    assert seen.keys() >= {"SLURM_JOB_ID", "VILA_SLURM_ACCOUNT", "NCCL_DEBUG"} and "SECRET_TOKEN" not in seen
