"""tools/doctor.py on the machine at hand, and a recipe it refuses."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from megatron_vlm.cli import doctor
from megatron_vlm.cli.doctor import Finding, operation, operations, show
from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT
from tests.helpers.ranks.tool_runs import tool


@pytest.mark.slow
def test_this_machine_and_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny_recipe(tmp_path)))
    done = tool("doctor.py", recipe, "parallel.tensor=2", "--world-size", 4, "--json", tmp_path / "found.json")
    assert (done.code, done.stderr) == (0, ""), done.stdout
    assert done.stdout.count("\n") <= 40, "one screen"
    assert max(map(len, done.stdout.splitlines()[1:])) <= 100, "the first line holds the recipe's path"
    assert done.stdout.startswith(f"    ok  {recipe} is valid on 4 rank(s)\n"), "the recipe is judged first"
    report = json.loads((tmp_path / "found.json").read_text())
    states = {one["name"]: one["state"] for one in report["findings"]}
    assert {states[name] for name in ("Python", "required", "imports", "gloo, 2 processes")} == {"ok"}
    assert report["gpus"] == 0 and states["GPU"] == "absent"
    assert {states[f"ops.{choice['name']}"] for choice in report["backends"]["ops"]} == {"ok"}


def test_where_nothing_is_installed_that_is_what_it_finds(tmp_path: Path) -> None:
    """In an interpreter with the standard library alone, from another folder, with a recipe that needs more."""
    venv.create(tmp_path / "bare")
    command = [tmp_path / "bare" / "bin" / "python", ROOT / "tools" / "doctor.py", "recipe.yaml"]
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: recipe.yaml: cannot be checked here"), done.stderr
    assert done.stderr.count("\n") == 1
    marks = {line[8:].split()[0]: line[:8].strip() for line in done.stdout.splitlines() if line[:8].strip()}
    broken = ("packaging", "torch", "megatron-core", "rich", "imports", "gloo,", "ops")
    assert {marks[name] for name in broken} == {"BROKEN"}
    assert "no operation can run: ModuleNotFoundError: No module named 'torch'" in done.stdout
    assert marks["required"] == "note" and marks["Python"] == marks["cores"] == "ok"


def test_what_each_operation_takes_on_a_bare_cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    lines, facts = operations()
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    told = {line.name: line for line in lines}
    assert {line.state for line in lines} == {"ok"}
    for name in ("norm", "activation", "rope"):
        assert told[f"ops.{name}"].value == "auto takes torch; can run: torch, reference"
        assert told[f"ops.{name}"].passed_over == {"triton": "it needs a CUDA device, found cpu"}
    assert told["ops.attention"].value.startswith("auto takes cpu; can run: ")


def test_what_each_operation_takes_without_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`sitecustomize` is what Python imports first."""
    hidden = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
"""
    (tmp_path / "sitecustomize.py").write_text(hidden)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines, _ = operations()
    told = {line.name: line for line in lines}
    missing = "the package triton is not installed"
    for name in ("norm", "space to depth", "bias and GELU", "linear into rows"):
        assert "can run: torch, reference" in told[f"ops.{name}"].value, name
        assert told[f"ops.{name}"].passed_over["triton"] == missing, name
    assert all(line.passed_over.get("triton") == missing or "prototypes" in name or "matmul" in name
               for name, line in told.items() if name.startswith("ops."))  # fmt: skip


def test_an_operation_that_nothing_can_run_is_broken() -> None:
    choice = {"name": "own", "taken": None, "offered": [], "passed_over": {"fast": "it needs wings"}}
    found = operation("cuda", choice)
    assert (found.state, found.value) == ("broken", "nothing can run on cuda")
    assert found.passed_over == {"fast": "it needs wings"}


def test_lines_fit_a_terminal_and_a_reason_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "it needs " + "a very long word " * 12
    show([
        Finding("ops.one", "ok", "auto takes a; can run: a", passed_over={"b": wide, "c": "it needs c"}),
        Finding("ops.two", "note", "auto takes a; can run: a, " + "x, " * 40, "do this", {"b": wide}),
        Finding("plain", "ok", "well"),
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    told = " ".join(" ".join(lines).split())
    assert told.count("it needs a very long word") == 1 and told.count("it needs c") == 1
    assert "auto takes a; can run: a; not b [1], c [2]" in told and "; not b [1] -> do this" in told
    assert lines[-1].split(maxsplit=1) == ["[2]", "it needs c"]


def test_a_wrong_recipe_is_told_before_anything_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, asked = tmp_path / "recipe.yaml", []
    recipe.write_text("training: {step: 5}")
    monkeypatch.setattr(doctor, "packages", lambda: asked.append("packages") or [])  # what is raised there is told
    monkeypatch.setattr(sys, "argv", ["doctor.py", str(recipe)])
    with pytest.raises(SystemExit):
        doctor.main()
    assert not asked and "training.step: unknown key" in capsys.readouterr().err
