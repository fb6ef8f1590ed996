"""Files and functions that a reader can hold in the head: limits of length and of parameters (STYLE 3)."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, TOP_FOLDERS, python_files, tree_of


@dataclass(frozen=True)
class Limits:
    """Lines of a file, lines of a function (its docstring counts), parameters of a function."""

    file_lines: int = 500
    function_lines: int = 60
    num_parameters: int = 7


KERNELS = Limits(file_lines=700, function_lines=150, num_parameters=40)  # a launch takes pointers, sizes and strides


def violations(path: Path, source: str, tree: ast.Module) -> Iterator[str]:
    """Everything in this file over its limits."""
    limits = KERNELS if path.parts[0] == "kernels" else Limits()
    num_lines = source.count("\n") + 1
    if num_lines > limits.file_lines:
        yield f"{path}: {num_lines} lines, allowed {limits.file_lines}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if length > limits.function_lines:
            yield f"{path}:{node.lineno} {node.name}: {length} lines, allowed {limits.function_lines}"
        number = num_parameters(node)
        if number > limits.num_parameters:
            yield f"{path}:{node.lineno} {node.name}: {number} parameters, allowed {limits.num_parameters}"


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Named parameters without self or cls; `*args` and `**kwargs` pass things on and do not count."""
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (bool(names) and names[0] in ("self", "cls"))


def test_sizes() -> None:
    found = [
        violation
        for path in python_files(*TOP_FOLDERS)
        for violation in violations(path, (ROOT / path).read_text(), tree_of(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n" * 500, "501 lines"),
        ("def f():\n" + "    x = 1\n" * 60, "f: 61 lines"),
        ("class A:\n    def f(self, a, b, c, d, e, g, *, h, i, **rest): ...", "f: 8 parameters"),
    ],
)
def test_the_rule_can_fail(source: str, expected: str) -> None:
    (violation,) = violations(Path("megatron_vlm/x.py"), source, ast.parse(source))
    assert expected in violation
    assert not list(violations(Path("kernels/x.py"), source, ast.parse(source)))


def test_the_limits_themselves_pass() -> None:
    source = "class A:\n    def f(self, a, b, c, d, e, g, *, h, **rest):\n" + "        x = 1\n" * 59
    assert not list(violations(Path("megatron_vlm/x.py"), source, ast.parse(source)))
