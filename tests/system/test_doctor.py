"""tools/doctor.py on the machine at hand, and a recipe it refuses."""

import json
from pathlib import Path

from megatron_vlm.config import to_yaml
from tests.helpers.tiny import tiny_recipe
from tests.system.test_tools import tool


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
