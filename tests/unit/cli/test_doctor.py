"""The doctor's findings where something is missing, and that its table knows every optional package."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_vlm.cli import doctor
from megatron_vlm.config import to_yaml
from megatron_vlm.ops.table import TABLE
from megatron_vlm.registry import Registry
from megatron_vlm.runtime.environment import Finding
from tests.helpers.models.tiny import tiny_recipe

TO_COME = {"nvidia-dali-cuda130", "deepspeed", "faiss-cpu", "h5py", "pyarrow"}


def test_what_a_package_is_for_is_what_the_registries_have_of_it() -> None:
    """Every package of an extra is needed by something registered, or its part is still to come."""
    extras = {extra: ranges for extra, ranges in doctor.requirements().items() if extra != "required"}
    listed = {doctor.find(one)[0] for extra, ranges in extras.items() if extra not in doctor.WORKSHOP for one in ranges}
    enabled = doctor.operations()[1]["packages"]
    assert listed - set(enabled) == TO_COME and set(doctor.WORKSHOP) <= set(extras)
    assert enabled["flash-attn"] == {"backend flash_attn of": ["attention"]}
    with_kernels = {entry.name for entry in TABLE if "triton" in [one.name for one in entry.operation.backends]}
    assert set(enabled["triton"]["backend triton of"]) == with_kernels and len(with_kernels) > 5
    assert any("fp8" in reason for reason in enabled["transformer-engine"])


def test_a_package_is_told_with_what_is_registered_for_it() -> None:
    sources: Registry[int] = Registry("data source")
    sources.register("hdf5", package="h5py")(1)
    sources.register("llava_json")(2)
    assert sources.packages == {"hdf5": "h5py"}
    found = [("h5py>=3.12", "h5py", None, False), ("pyarrow>=18", "pyarrow", None, False)]
    (told,) = doctor.optional(found, {"h5py": {"data source": ["hdf5"]}})
    assert told == Finding("h5py", "absent", "data source hdf5", "pip install 'h5py>=3.12'")
    assert not list(doctor.optional(found, {}))


def test_an_installed_package_says_its_ranges_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IS_CHECKOUT", False)
    lines = [
        "torch<2.14,>=2.11",
        'transformer-engine[pytorch]>=2.9; extra == "gpu"',
        'triton>=3 ; extra == "kernels"',
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: {"megatron_vlm": lines}[name])
    assert doctor.requirements() == {
        "required": ["torch<2.14,>=2.11"],
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "kernels": ["triton>=3"],
    }


@pytest.mark.parametrize(
    ("requirement", "fits"),
    [("torch>=2.11,<2.14", True), ("torch>=99", False), ("transformer-none[pytorch]>=2.9", False)],
)
def test_versions_are_compared(requirement: str, fits: bool) -> None:
    assert doctor.find(requirement)[2] is fits


def run(monkeypatch: pytest.MonkeyPatch, required: list[str], *arguments: str) -> int:
    """The exit code where these packages are required and children find nothing wrong."""
    monkeypatch.setattr(doctor, "requirements", lambda: {"required": required, "gpu": ["flash-attn>=99"]})
    monkeypatch.setattr(doctor, "accelerators", lambda: ([], 0))
    monkeypatch.setattr(doctor, "meeting", lambda backend, size: Finding(backend, "ok", str(size)))
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
    try:
        doctor.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_only_what_is_required_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, ["torch>=2"], "--json", str(tmp_path / "found.json")) == 0
    assert "flash-attn" in (told := capsys.readouterr().out) and "pip install 'flash-attn>=99'" in told
    states = {one["name"]: one["state"] for one in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert states["flash-attn"] == "absent" and states["gloo"] == "ok" and "nccl" not in states

    assert run(monkeypatch, ["torch>=99", "no-such-package"]) == 1
    told = capsys.readouterr().out
    assert "pip install 'torch>=99'" in told and told.endswith("broken: torch, no-such-package\n")


def test_a_report_that_cannot_be_written_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, [], "--json", str(tmp_path / "none" / "found.json")) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_recipe_that_does_not_fit_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny_recipe(tmp_path)))
    options = [str(recipe), "parallel.tensor=2", "--world-size"]
    assert run(monkeypatch, [], *options, "4") == 0
    assert f"{recipe} is valid on 4 rank(s)" in capsys.readouterr().out
    assert run(monkeypatch, [], *options, "3") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: parallel.tensor * parallel.pipeline: found 2 * 1 = 2")


@pytest.mark.parametrize(
    ("obstacles", "state", "expected", "passed_over"),
    [
        (("it needs a GPU", None), "ok", "auto takes native", {"transformer_engine": "it needs a GPU"}),
        ((None, None), "ok", "auto takes transformer_engine", {"native": "transformer_engine comes first"}),
        (
            ("it is older than 2.2", "too old"),
            "note",
            "nothing computes in FP8 on cuda",
            {"transformer_engine": "it is older than 2.2", "native": "too old"},
        ),
    ],
)
def test_who_computes_in_fp8_is_told_with_the_reason(
    obstacles: tuple[str | None, str | None], state: str, expected: str, passed_over: dict[str, str]
) -> None:
    found = doctor.fp8("cuda", dict(zip(("transformer_engine", "native"), obstacles, strict=True)))
    assert found.state == state and expected in found.value and found.passed_over == passed_over


def test_fp8_and_operations_that_no_run_uses_are_told() -> None:
    from megatron_vlm.ops.table import TABLE

    told = {one.name: one for one in doctor.operations()[0]}
    assert told["precision.fp8"].value == "fp8_backend auto takes native"
    assert told["precision.fp8"].passed_over["transformer_engine"].startswith("it ")
    assert set(doctor.NO_RUN_USES_IT) <= {entry.name for entry in TABLE}
    assert {name.removeprefix("ops."): one.unused for name, one in told.items() if one.unused} == doctor.NO_RUN_USES_IT


@pytest.mark.parametrize(("at_work", "state"), [(1000.0, "note"), (0.5, "broken")])
def test_operations_that_are_late_on_a_busy_machine_are_not_broken(
    monkeypatch: pytest.MonkeyPatch, at_work: float, state: str
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (at_work, 0.0, 0.0))
    monkeypatch.setattr(doctor, "OPERATIONS_SECONDS", 0.05)
    (found,), facts = doctor.operations()
    assert (found.name, found.state, facts) == ("ops", state, {})
    assert ("the machine is busy: 1000.0 processes running" in found.value) is (state == "note")


@pytest.mark.parametrize(
    ("requested", "gpus", "expected"),
    [
        ("cpu", 8, "cpu"),
        ("auto", 8, "cuda"),
        ("auto", 1, "cpu"),
        ("cuda", 2, "cuda"),
        ("cuda", 1, None),  # it runs elsewhere: nobody here knows what that machine has
    ],
)
def test_a_recipe_is_asked_about_the_device_that_two_ranks_would_have_here(monkeypatch, requested, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = doctor.device_here(requested, 2)
    assert (found if found is None else found.type) == expected
