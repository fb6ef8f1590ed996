"""No circle of imports, so that any module can be read, tested and moved with only what lies below it (DESIGN 2).

Every import counts, also one inside a function or under TYPE_CHECKING: it hides a circle from Python, not from whoever
reads or moves the modules. A package's `__init__` counts where a name of its own is imported, not where a module below
it is, though Python runs it then too: it may gather what its modules define.
"""

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.architecture.sources import TOP_FOLDERS, imports, python_files, tree_of

SCRIPTS = Path("tools")  # Python puts a script's folder before all others: `from benchmarks import attention`


def module_of(path: Path) -> str:
    """As it is imported: `megatron_vlm/data/batch.py` -> megatron_vlm.data.batch; kernels/ is no package."""
    parts = path.with_suffix("").parts[path.parts[0] == "kernels" :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the project that a file imports. Of `from a import b` it is a.b if that is one, else a."""
    prefixes = ("", "tools.") if path.parent == SCRIPTS else ("",)
    for found in imports(tree, path):
        names = [f"{prefix}{name}" for prefix in prefixes for name in (found.module, found.module.rpartition(".")[0])]
        yield from [name for name in names if name in known][:1]


def find_circle(trees: Mapping[Path, ast.Module]) -> list[str]:
    """Modules of which each imports the next, the last the first; empty where there is no circle."""
    known = {module_of(path): path for path in trees}
    graph = {name: set(imported_modules(path, trees[path], known)) - {name} for name, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle: list[str] = error.args[1]  # each before those that import it, the first again at the end
        return circle[:0:-1]
    return []


def test_no_circle_of_imports() -> None:
    trees = {path: tree_of(path) for path in python_files(*TOP_FOLDERS)}
    circle = find_circle(trees)
    assert not circle, " imports ".join([*circle, circle[0]])


def trees_of(sources: Mapping[str, str]) -> dict[Path, ast.Module]:
    return {Path(path): ast.parse(source) for path, source in sources.items()}


@pytest.mark.parametrize(
    "sources",
    [
        {"megatron_vlm/a.py": "from megatron_vlm.b import f", "megatron_vlm/b.py": "import megatron_vlm.a"},
        {"megatron_vlm/a.py": "from megatron_vlm import b", "megatron_vlm/b.py": "from .a import g"},
        {"megatron_vlm/a.py": "from .b import f", "megatron_vlm/b.py": "def f():\n    from .a import g"},
        {"tests/a.py": "from tests.b import f", "tests/b.py": "if TYPE_CHECKING:\n    from tests.a import G"},
        {"tools/x/a.py": "from . import b", "tools/x/b.py": "from .c import f", "tools/x/c.py": "from .a import g"},
        {"tools/bench.py": "from x import a", "tools/x/a.py": "from tools.bench import f"},
        {
            "kernels/megatron_vlm_kernels/a.py": "from megatron_vlm_kernels import b",
            "kernels/megatron_vlm_kernels/b.py": "from megatron_vlm_kernels.a import f",
        },
        {
            "megatron_vlm/x/__init__.py": "from megatron_vlm.x.a import f",
            "megatron_vlm/x/a.py": "from megatron_vlm.x import f",
        },
    ],
)
def test_a_circle_is_found(sources: dict[str, str]) -> None:
    assert len(find_circle(trees_of(sources))) == len(sources)


def test_a_circle_is_told_in_the_order_of_its_imports() -> None:
    sources = {"tests/a.py": "import tests.b", "tests/b.py": "import tests.c", "tests/c.py": "import tests.a"}
    circle = find_circle(trees_of(sources))
    start = circle.index("tests.a")
    assert circle[start:] + circle[:start] == ["tests.a", "tests.b", "tests.c"]


@pytest.mark.parametrize(
    "sources",
    [
        {
            "megatron_vlm/x/__init__.py": "from megatron_vlm.x.a import f\nfrom megatron_vlm.x.b import g",
            "megatron_vlm/x/a.py": "from megatron_vlm.x.b import g",
            "megatron_vlm/x/b.py": "import torch",
        },
        {"megatron_vlm/logging.py": "import logging", "megatron_vlm/a.py": "from .logging import get_logger"},
        {"tools/bench.py": "from x import a", "tools/x/a.py": "from tools.x.b import f", "tools/x/b.py": ""},
    ],
)
def test_no_circle_is_found_where_there_is_none(sources: dict[str, str]) -> None:
    assert find_circle(trees_of(sources)) == []
