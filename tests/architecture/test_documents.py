"""Documents that cannot rot: every path they name exists, the walk of one batch names real functions (DESIGN D15)."""

import pytest

from tests.architecture.documents import defines, exists, named_paths, references
from tests.architecture.sources import ROOT

DOCUMENTS = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/design.md", "docs/traps.md", "docs/extending.md",
    "docs/limitations.md", "docs/training.md", "docs/running.md", "megatron_vlm/data/README.md",
)  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_exist(document: str) -> None:
    paths = set(named_paths((ROOT / document).read_text()))
    assert paths, f"{document} names no path that this test understands"
    missing = sorted(path for path in paths if not exists(path, (ROOT / document).parent))
    assert not missing, f"{document} names what does not exist: {', '.join(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_functions_named_exist(document: str) -> None:
    found = references((ROOT / document).read_text())
    missing = [f"{path}:{name}" for path, name in found if not defines(path, name)]
    assert not missing, f"{document} names what does not exist: {', '.join(missing)}"


def test_the_walk_of_one_batch_names_its_functions() -> None:
    found = references((ROOT / "ARCHITECTURE.md").read_text())
    packages = {path.removeprefix("megatron_vlm/").split("/")[0] for path, _ in found}
    assert {"data", "models", "parallel", "training"} <= packages, found
    assert len(found) >= 8, found


def test_the_rules_can_fail() -> None:
    text = """See `megatron_vlm/nowhere.py`, `models/gone/`, [that](docs/none.md#part) and `setup.py`; not `a/clip`,
    `--json FILE`, `runs/x.png` or [out](https://example.com/a.py).
```
python tools/none.py RECIPE.yaml tests/architecture/test_*.py
```
    The step is `training/none.py:run` and `tests/architecture/documents.py:exists`."""
    paths = set(named_paths(text))
    assert {path for path in paths if not exists(path)} == {
        "megatron_vlm/nowhere.py",
        "models/gone/",
        "docs/none.md",
        "tools/none.py",
        "training/none.py",
    }
    assert {path for path in paths if exists(path)} == {
        "setup.py",
        "tests/architecture/test_*.py",
        "tests/architecture/documents.py",
    }
    assert references(text) == [("training/none.py", "run"), ("tests/architecture/documents.py", "exists")]
    assert defines("tests/architecture/documents.py", "exists")
    assert defines("config/schema/recipe.py", "Config") and defines("megatron_vlm/registry.py", "Registry.get")
    assert defines("registry.py", "T") and defines("tests/architecture/test_documents.py", "DOCUMENTS")
    assert exists("docs/decisions/0001") and not exists("docs/decisions/9999")
    assert exists("../README.md", ROOT / "docs") and not exists("../none.md", ROOT / "docs")
    assert not defines("tests/architecture/documents.py", "exist")
    assert not defines("config/schema/recipe.py", "Config.get")
