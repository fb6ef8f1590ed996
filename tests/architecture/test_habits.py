"""Habits that a syntax tree can show: no print in the library, the environment read in one place, modules that say what
they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import TOP_FOLDERS, imports, python_files, tree_of

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def prints(path: Path, tree: ast.Module) -> Iterator[str]:
    """Calls of print."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{path}:{node.lineno} prints; log through megatron_vlm.runtime.logging"


def environment_reads(path: Path, tree: ast.Module) -> Iterator[str]:
    """`os.environ`, `os.getenv` and their kin, however imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and isinstance(node.value, ast.Name):
            if node.value.id == "os":
                yield f"{path}:{node.lineno} touches os.{node.attr}; the environment is read in runtime/ only"
    for found in imports(tree, path):
        if found.module in {f"os.{name}" for name in ENVIRONMENT}:
            yield f"{path}:{found.line} imports {found.module}; the environment is read in runtime/ only"


def test_no_print_outside_tools_and_examples() -> None:
    found = [line for path in python_files("megatron_vlm", "kernels") for line in prints(path, tree_of(path))]
    assert not found, "\n".join(found)


def test_environment_is_read_in_runtime_only() -> None:
    files = [
        path
        for path in python_files("megatron_vlm", "kernels", "tools", "examples")
        if path.parts[:2] != ("megatron_vlm", "runtime")
    ]
    found = [line for path in files for line in environment_reads(path, tree_of(path))]
    assert not found, "\n".join(found)


def test_modules_open_with_what_they_are() -> None:
    files = [path for path in python_files(*TOP_FOLDERS) if tree_of(path).body]
    missing = [str(path) for path in files if not ast.get_docstring(tree_of(path))]
    assert not missing, "no module docstring: " + ", ".join(missing)


def test_kernels_folder_is_no_package() -> None:
    """`kernels` is the import name of Hugging Face's kernels package, which transformers probes."""
    assert Path("kernels/__init__.py") not in python_files("kernels")


@pytest.mark.parametrize("source", ["print(1)", "def f():\n    return print('x')"])
def test_the_print_rule_can_fail(source: str) -> None:
    assert len(list(prints(Path("x.py"), ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['A']", "from os import getenv", "import os\nos.getenv('A')", "from os import environ as e"],
)
def test_the_environment_rule_can_fail(source: str) -> None:
    assert len(list(environment_reads(Path("x.py"), ast.parse(source)))) == 1
