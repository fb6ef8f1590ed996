"""Each package imports only from rows below it, and foreign packages only where they are allowed (DESIGN 2).

So the tree is the architecture, and what breaks on an upgrade of megatron-core or transformers is known beforehand.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, imports, python_files, tree_of

ROWS = (  # top first
    ("tools", "examples", "__main__"),
    ("cli",),
    ("training",),
    ("evaluation", "retrieval"),
    ("generation",),
    ("planner", "conversion"),
    ("checkpoint",),
    ("data",),
    ("models",),
    ("parallel",),
    ("ops", "config"),
    ("runtime",),
    ("registry",),
    ("errors",),
)
HEIGHT = {name: len(ROWS) - row for row, names in enumerate(ROWS) for name in names}

ALLOWED = {  # foreign package -> where it may be imported (a folder, a file or a package of ours)
    "megatron.core": (
        "runtime",
        "parallel",
        "models",
        "training",
        "checkpoint",
        "generation",
        "megatron_vlm/config/megatron.py",
    ),
    "transformers": ("models", "data", "conversion", "cli", "tools", "examples"),
    "megatron_vlm_kernels": ("ops", "kernels"),
    "triton": ("kernels",),
}
PURE = (  # plans and layouts: functions of numbers, tested without a process group
    "megatron_vlm/parallel/layout.py",
    "megatron_vlm/parallel/ring_plan.py",
    "megatron_vlm/parallel/media_plan.py",
    "megatron_vlm/planner/timeline.py",
)
KERNEL_IMPORTS = {"torch", "triton", "megatron_vlm_kernels"} | sys.stdlib_module_names


def package_of(path: Path) -> str:
    """`megatron_vlm/models/vlm.py` -> models, `megatron_vlm/errors.py` -> errors, `tools/train.py` -> tools."""
    if path.parts[0] != "megatron_vlm":
        return path.parts[0]
    return path.parts[1].removesuffix(".py")


def starts(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def violations(path: Path, tree: ast.Module) -> Iterator[str]:
    """What this file imports and may not."""
    package = package_of(path)
    for found in imports(tree, path):
        where = f"{path}:{found.line} imports {found.module}"
        if path == Path("megatron_vlm/__init__.py"):
            lazily = found.in_function and starts(found.module, "megatron_vlm.generation.load")
            if not lazily and found.module.split(".")[0] not in sys.stdlib_module_names:
                yield f"{where}: the package itself imports nothing but generation.load, inside a function"
            continue
        if package == "kernels" and found.module.split(".")[0] not in KERNEL_IMPORTS:
            yield f"{where}: kernels import torch and triton only"
            continue
        if starts(found.module, "megatron_vlm") and found.module.count("."):
            target = found.module.split(".")[1]
            if target in HEIGHT and target != package and HEIGHT[target] >= HEIGHT.get(package, 0):
                yield f"{where}: {target} is not below {package}"
        for foreign, places in ALLOWED.items():
            if starts(found.module, foreign) and package not in places and str(path) not in places:
                yield f"{where}: {foreign} is allowed in {', '.join(places)} only"
        if package == "config" and path.name != "megatron.py" and starts(found.module, "torch"):
            yield f"{where}: of config/, only megatron.py may import torch"
        if str(path) in PURE and (starts(found.module, "megatron") or starts(found.module, "torch.distributed")):
            yield f"{where}: {path.name} is pure"


def test_every_package_has_a_row() -> None:
    known = set(HEIGHT) | {"__init__"}
    assert {package_of(path) for path in python_files("megatron_vlm")} <= known


def test_layers() -> None:
    files = python_files("megatron_vlm", "kernels", "tools", "examples")
    found = [violation for path in files for violation in violations(path, tree_of(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_vlm/models/vlm.py", "from megatron_vlm.training import step"),
        ("megatron_vlm/models/vlm.py", "def f():\n    import megatron_vlm.data.batch"),
        ("megatron_vlm/models/vlm.py", "from ..data import batch"),
        ("megatron_vlm/training/loop.py", "from megatron_vlm.cli import train"),
        ("megatron_vlm/ops/norm.py", "from megatron_vlm import config"),
        ("megatron_vlm/errors.py", "import megatron_vlm.registry"),
        ("megatron_vlm/ops/norm.py", "import megatron_vlm.ops.rope\nimport megatron_vlm.models.merge"),
        ("megatron_vlm/data/batch.py", "import megatron.core"),
        ("megatron_vlm/config/loading.py", "from megatron.core import parallel_state"),
        ("megatron_vlm/config/loading.py", "import torch"),
        ("megatron_vlm/parallel/groups.py", "import transformers"),
        ("megatron_vlm/models/merge.py", "import megatron_vlm_kernels.merge"),
        ("megatron_vlm/parallel/layout.py", "import torch.distributed as dist"),
        ("megatron_vlm/__init__.py", "import torch"),
        ("megatron_vlm/__init__.py", "from megatron_vlm.generation.load import load"),
        ("kernels/megatron_vlm_kernels/merge.py", "import megatron_vlm.errors"),
    ],
)
def test_the_rule_can_fail(path: str, source: str) -> None:
    assert len(list(violations(Path(path), ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "megatron_vlm/models/vlm.py",
            "from megatron_vlm.parallel.groups import Grid\nfrom .merge import merge_features",
        ),
        ("megatron_vlm/config/megatron.py", "import torch\nfrom megatron.core import optimizer"),
        ("megatron_vlm/__init__.py", "def load():\n    from megatron_vlm.generation.load import load"),
        ("tools/train.py", "from megatron_vlm.training import loop\nimport megatron_vlm"),
        ("megatron_vlm/__main__.py", "from megatron_vlm.cli.main import main"),
        ("megatron_vlm/parallel/layout.py", "import torch"),
    ],
)
def test_the_rule_can_pass(path: str, source: str) -> None:
    assert not list(violations(Path(path), ast.parse(source)))


def test_recipes_are_read_without_torch() -> None:
    """What the syntax trees say, seen from outside: a recipe can be checked before torch is imported."""
    program = "import sys, megatron_vlm, megatron_vlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_weights_are_moved_without_megatron_core() -> None:
    """Importing it takes as long as torch and transformers together: half of the time of converting a small model."""
    modules = ("transfer.importing", "transfer.exporting", "transfer.foreign_inspection", "formats")
    program = f"import sys, {', '.join(f'megatron_vlm.conversion.{name}' for name in modules)}; "
    program += "sys.exit(any(name.startswith('megatron.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0
