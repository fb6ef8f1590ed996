"""docs/extending.md: extension points have their file, table, test and example, and tables their row (DESIGN D15)."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.documents import defines, references
from tests.architecture.sources import ROOT, python_files, tree_of

TEXT = (ROOT / "docs" / "extending.md").read_text()
COLUMNS = ("what", "named by", "table", "must pass", "example")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.py)`")
Row = dict[str, str]


def rows(text: str) -> list[Row]:
    """The table's rows by column."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    assert lines and tuple(lines[0]) == COLUMNS, lines[:1]
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in lines[1:]]


def text_of(path: str) -> str:
    """What is in the file; nothing, where there is none."""
    return (ROOT / path).read_text() if (ROOT / path).is_file() else ""


def faults(row: Row) -> Iterator[str]:
    """What of a row is not there, or does not belong together."""
    tables, examples = references(row["table"]), FILE.findall(row["example"])
    tests = FILE.findall(row["must pass"])
    if not (tables and tests and examples):
        yield f"{row['what']}: needs a table (`file.py:NAME`), a test and an example"
    for path, name in tables:
        if not defines(path, name):
            yield f"{path} defines no {name}"
    for path in tests:
        if "\ndef test_" not in text_of(path):
            yield f"{path} holds no test"
    for path in examples:
        if not text_of(path):
            yield f"{path} is not there"
        registered = [name for _, name in tables if name in registries()]
        if any(f"{name}.register" not in text_of(path) for name in registered if text_of(path)):
            yield f"{path} registers nothing in {', '.join(registered)}"


def registries() -> dict[str, str]:
    """Name -> file of every `NAME: Registry[...] = Registry(...)` at the top of a module of the package."""
    found = {}
    for path in python_files("megatron_vlm"):
        for node in tree_of(path).body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("Registry["):
                found[ast.unparse(node.target)] = str(path)
    return found


def test_every_row_is_whole() -> None:
    found = rows(TEXT)
    assert len(found) >= 14
    wrong = [fault for row in found for fault in faults(row)]
    assert not wrong, "\n".join(wrong)


def test_every_table_of_names_has_a_row() -> None:
    known = registries()
    assert len(known) >= 7, known
    named = {(path, name) for row in rows(TEXT) for path, name in references(row["table"])}
    missing = [f"{path}:{name}" for name, path in known.items() if (path, name) not in named]
    assert not missing, f"docs/extending.md has no row for {', '.join(missing)}"


def test_every_example_of_an_extension_is_named() -> None:
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "examples" / "extensions").glob("*.py")}
    assert examples and examples <= set(FILE.findall(TEXT))


WHOLE = {
    "what": "x",
    "named by": "`data.source`",
    "table": "`megatron_vlm/data/sources/base.py:SOURCES`",
    "must pass": "`tests/system/test_extensions.py`",
    "example": "`examples/extensions/own_source.py`",
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"table": "`megatron_vlm/data/sources/base.py:SORCES`"}, "sources/base.py defines no SORCES"),
        ({"table": "SOURCES"}, "x: needs a table"),
        ({"must pass": "`tests/system/test_none.py`"}, "tests/system/test_none.py holds no test"),
        ({"must pass": "`tests/helpers/models/tiny.py`"}, "tests/helpers/models/tiny.py holds no test"),
        ({"example": "`examples/extensions/none.py`"}, "examples/extensions/none.py is not there"),
        ({"example": "`examples/extensions/own_tower.py`"}, "own_tower.py registers nothing in SOURCES"),
    ],
)
def test_the_rule_can_fail(change: Row, fault: str | None) -> None:
    found = list(faults(WHOLE | change))
    assert len(found) == (fault is not None) and all(fault in one for one in found if fault is not None), found
