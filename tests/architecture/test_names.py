"""Every name of ours that a file imports exists where it is imported from, found by syntax trees alone.

A test that is run seldom (on a GPU, in the slow lane) would else learn of a move or a new name only there. The same
holds for dotted names in strings, by which tests patch and children import.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, TOP_FOLDERS, imports, python_files, tree_of

OURS = ("megatron_vlm", "megatron_vlm_kernels", "tools", "tests", "examples")
DOTTED = re.compile(r"megatron_vlm(_kernels)?(\.(?!json\b)[A-Za-z_]\w*)+")  # megatron_vlm.json is a file of exports
ROOTS = {"megatron_vlm_kernels": Path("kernels")}


@cache
def module_file(module: str) -> Path | None:
    """The file of a module of ours, relative to the root; None where there is none. A folder is its __init__.py."""
    place = ROOTS.get(module.partition(".")[0], Path()) / Path(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if (ROOT / path).is_file():
            return path
    return place if (ROOT / place).is_dir() else None


@cache
def names_of(path: Path) -> frozenset[str]:
    """What a module defines at its top level, whatever the condition; `*` where it makes names when asked."""
    if path.suffix != ".py":
        return frozenset()
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree_of(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add("*" if node.name == "__getattr__" else node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        else:
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def resolves(name: str) -> bool:
    """Whether a dotted name of ours is a module, or a name in one; what follows that name is not looked at."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = module_file(".".join(parts[:length]))
        if path is not None:
            return length == len(parts) or parts[length] == "*" or bool({parts[length], "*"} & names_of(path))
    return False


def unresolved(path: Path, tree: ast.Module) -> Iterator[str]:
    """Imports, and strings that are dotted names, which lead nowhere."""
    named = [(found.module, found.line) for found in imports(tree, path) if found.module.partition(".")[0] in OURS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            named.append((node.value, node.lineno))
    yield from (f"{path}:{line}: {name} does not exist" for name, line in named if not resolves(name))


def test_what_is_imported_exists() -> None:
    found = [line for path in python_files(*TOP_FOLDERS) for line in unresolved(path, tree_of(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from megatron_vlm.errors import ConfigError", 0),
        ("from megatron_vlm.errors import NoSuchError", 1),
        ("from megatron_vlm.no_such import thing", 1),
        ("import megatron_vlm.no_such.module", 1),
        ("def f():\n    from megatron_vlm import no_such", 1),
        ("patch('megatron_vlm.errors.one_line')", 0),
        ("patch('megatron_vlm.errors.ConfigError.no_such_method')", 0),
        ("patch('megatron_vlm.errors.no_such')", 1),
        ("from megatron_vlm_kernels.attention import attention", 0),
        ("from megatron_vlm_kernels.attention import no_such", 1),
        ("text = 'megatron_vlm. It has a full stop'", 0),
    ],
)
def test_a_name_that_leads_nowhere_is_found(source: str, count: int) -> None:
    assert len(list(unresolved(Path("tests/made_up.py"), ast.parse(source)))) == count
