"""No test imports a test: what several share (recipes, runners, constants) lies in a module that holds no test.

A test module can then be renamed, split or left out of a lane without another's breaking.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, TOP_FOLDERS, imports, python_files, tree_of

TEST_MODULE = re.compile(r"\btests(\.\w+)*\.test_\w+")


def imported_tests(path: Path, tree: ast.Module) -> Iterator[str]:
    """Imports of test modules, those in the text of a child's program or of a patch's target too."""
    for found in imports(tree, path):
        if TEST_MODULE.match(found.module):
            yield f"{path}:{found.line} imports {found.module}; what tests share lies in tests/helpers or beside them"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (named := TEST_MODULE.search(node.value)):
            yield f"{path}:{node.lineno} names {named[0]}; what tests share lies in tests/helpers or beside them"


def test_no_test_imports_a_test() -> None:
    found = [line for path in python_files(*TOP_FOLDERS) for line in imported_tests(path, tree_of(path))]
    assert not found, "\n".join(found)


def hiding(name: str) -> bool:
    """Whether a module hides another from a script that is started in its folder, which Python searches first."""
    return name in sys.stdlib_module_names or name in TOP_FOLDERS


def test_no_helper_hides_what_scripts_beside_it_import() -> None:
    folder = ROOT / "tests" / "helpers"
    assert [path.name for path in folder.rglob("*.py") if hiding(path.stem)] == []
    assert hiding("tools") and hiding("json") and not hiding("recipes")


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from tests.unit.data.{} import READER", 1),
        ("from tests.unit.data import {}", 1),
        ("import tests.{}", 1),
        ("from .{} import READER", 1),
        ("def f():\n    from tests.unit.data.{} import READER", 1),
        ("mock.patch('tests.unit.data.{}.READER')", 1),
        ("from tests.helpers.data.videos import READER", 0),
        ("from megatron_vlm.{} import x", 0),
    ],
)
def test_the_rule_can_fail(source: str, count: int) -> None:
    tree = ast.parse(source.format("test_video"))
    assert len(list(imported_tests(Path("tests/unit/data/test_other.py"), tree))) == count
