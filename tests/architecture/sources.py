"""The project's files and what their syntax trees say, for the architecture tests. Nothing here imports the project."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP_FOLDERS = ("megatron_vlm", "kernels", "tools", "examples", "tests")


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name; `from a import b` counts as `a.b` and may name an attribute."""

    module: str
    line: int
    in_function: bool


def python_files(*folders: str) -> list[Path]:
    """Python files under these top folders, relative to the root, sorted."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file given relative to the root."""
    return ast.parse((ROOT / path).read_text(), str(path))


def imports(tree: ast.Module, path: Path) -> list[Import]:
    """Every import of a file, at module level or inside a function; relative ones made absolute from `path`."""
    return list(_imports(tree, path, in_function=False))


def _imports(node: ast.AST, path: Path, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - child.level + 1] if child.level else ()
            base = ".".join([*package, *([child.module] if child.module else [])])
            yield from (Import(f"{base}.{alias.name}", child.lineno, in_function) for alias in child.names)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, path, inside)
