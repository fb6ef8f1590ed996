"""tools/doctor.py on the machine at hand, and a recipe it refuses."""

import json
import subprocess
import venv
from pathlib import Path

import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.processes import ROOT
from tests.helpers.tiny import tiny_recipe
from tests.system.test_tools import tool


@pytest.mark.slow
def test_this_machine_and_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny_recipe(tmp_path)))
    done = tool("doctor.py", recipe, "parallel.tensor=2", "--world-size", 4, "--json", tmp_path / "found.json")
    assert (done.code, done.stderr) == (0, ""), done.stdout
    assert done.stdout.count("\n") <= 40, "one screen"
    assert f"{recipe} is valid on 4 rank(s)" in done.stdout
    report = json.loads((tmp_path / "found.json").read_text())
    states = {one["name"]: one["state"] for one in report["findings"]}
    assert {states[name] for name in ("Python", "required", "imports", "gloo, 2 processes")} == {"ok"}
    assert report["gpus"] == 0 and states["GPU"] == "absent"


def test_where_nothing_is_installed_that_is_what_it_finds(tmp_path: Path) -> None:
    """In an interpreter with the standard library alone, from another folder, with a recipe that needs more."""
    venv.create(tmp_path / "bare")
    command = [tmp_path / "bare" / "bin" / "python", ROOT / "tools" / "doctor.py", "recipe.yaml"]
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: recipe.yaml: cannot be checked here"), done.stderr
    assert done.stderr.count("\n") == 1
    marks = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert {marks[name] for name in ("packaging", "torch", "megatron-core", "rich", "imports", "gloo,")} == {"BROKEN"}
    assert marks["required"] == "note" and marks["Python"] == marks["cores"] == "ok"
