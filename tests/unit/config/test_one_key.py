"""A new key of the recipe, with a rule, is one change of a schema file and one of a rules file, and no other: in a copy
of the package that has them, the key is validated, documented, printed and judged on a resume."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks.processes import ROOT, environment
from tests.unit.config.recipes import tree

SCHEMA = ("schema/schedule.py", "", '''
    cycles: int = Field(default=1, ge=1, description="Times that the rate rises and falls.")
''')  # fmt: skip
DECISION = ("rules/schedule.py", '{"schedule": False}', '{"schedule": False, "schedule.cycles": True}')
RULE = ("rules/schedule.py", "", '''

@RULES.of_recipe("schedule.cycles", says="must be 1 with `schedule.name: constant`")
def _cycles(config):
    if config.schedule.name == "constant" and config.schedule.cycles > 1:
        yield f"schedule.cycles: found {config.schedule.cycles} with schedule.name constant, needs 1"
''')  # fmt: skip
PROGRAM = """
import json, sys
from megatron_vlm.config import config_from_tree, reference, validate
from megatron_vlm.config.recipe_changes import refuse_recipe_changes
from megatron_vlm.errors import ConfigError

def told(call, *arguments):
    try:
        call(*arguments)
    except ConfigError as error:
        return str(error)

def recipe(**schedule):
    return config_from_tree(tree | {"schedule": schedule}, "test")

tree = json.loads(sys.argv[1])
print(json.dumps({
    "file": sys.modules["megatron_vlm"].__file__,
    "limit": told(lambda: recipe(cycles=0)),
    "rule": told(validate, recipe(name="constant", cycles=3), None, 1),
    "printed": told(reference.explain, "schedule.cycles") or reference.explain("schedule.cycles"),
    "page": [line for line in reference.markdown().splitlines() if "schedule.cycles`" in line],
    "tree": [line.split("#")[0].strip() for line in reference.tree().splitlines() if "cycles:" in line],
    "resume": told(refuse_recipe_changes, recipe(), recipe(cycles=3), "step_1"),
}))
"""


def outcome(folder: Path, *changes: tuple[str, str, str]) -> dict[str, Any]:
    """What a copy of the package says of `schedule.cycles` after changes: (file of config/, text, what it becomes); of
    no text, it is added at the end."""
    shutil.copytree(
        ROOT / "megatron_vlm", folder / "megatron_vlm", ignore=lambda _, names: {n for n in names if n in SKIPPED}
    )
    for name, before, after in changes:
        path = folder / "megatron_vlm" / "config" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1 or not before, f"{name} has not just one {before}"
        path.write_text(text.replace(before, after) if before else text + after, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(tree())], cwd=folder, capture_output=True, text=True, timeout=60,
        env=environment() | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("file") == str(folder / "megatron_vlm" / "__init__.py")
    return found


SKIPPED = {"__pycache__", "training", "models", "data", "parallel", "ops", "generation", "conversion", "checkpoint"}


def test_a_key_with_a_rule_touches_a_schema_file_and_a_rules_file(tmp_path: Path) -> None:
    found = outcome(tmp_path, SCHEMA, DECISION, RULE)
    assert found.pop("limit") == "test: schedule.cycles: found 0, must be greater than or equal to 1"
    assert found.pop("rule") == "schedule.cycles: found 3 with schedule.name constant, needs 1"
    assert found.pop("resume") is None
    rule = "Must be 1 with `schedule.name: constant`."
    assert found.pop("printed").splitlines() == [
        "schedule.cycles: integer >= 1, default 1", "    Times that the rate rises and falls.", f"    Rule: {rule}",
        "    On resume: may change.",
    ]  # fmt: skip
    assert found.pop("page") == [
        f"| `schedule.cycles` | integer >= 1 | `1` | Times that the rate rises and falls. | {rule} | may change |"
    ]
    assert found == {"tree": ["cycles: 1"]}


def test_without_the_rules_file_nothing_of_the_rule_is_known(tmp_path: Path) -> None:
    """So each of the two files does its part, and the test above can fail."""
    found = outcome(tmp_path, SCHEMA)
    assert found["rule"] is None and "Rule" not in found["printed"]
    assert found["resume"].startswith(
        "step_1 was saved with another recipe: schedule.cycles: found 3, it was trained with 1;"
    )


def test_without_the_schema_file_there_is_no_such_key(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="schedule.cycles: unknown key"):
        outcome(tmp_path, DECISION, RULE)
