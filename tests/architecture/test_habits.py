"""Habits that a syntax tree can show: no print in the library, the environment read in one place, modules that say what
they are."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, TOP_FOLDERS, imports, python_files, tree_of

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


RELATIVE = set(  # words that begin half a sentence, of which a tooltip shows no other half
    "After Against Along Among And As At Before Behind Beside Between By For From How If In Into Like Maybe Not Of On "
    "Or Out Over Per That To Under Until Whatever What When Where Which Who Why With Without".split()
)


def half_sentences(path: Path, tree: ast.Module) -> Iterator[str]:
    """Docstrings whose first line does not stand alone (STYLE 10): it begins with a preposition or a relative word.
    "Whether" is kept for what is true or false."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and (first := text.split()[0].strip(",.;:([")) in RELATIVE:
            yield f"{path}:{node.body[0].lineno} opens with {first!r}; a verb or a noun stands alone in a tooltip"


def test_docstrings_open_with_what_stands_alone() -> None:
    folders = [folder for folder in TOP_FOLDERS if folder != "tests"]
    found = [line for path in python_files(*folders) for line in half_sentences(path, tree_of(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""What a thing is."""', 1),
        ('def f():\n    """Of all ranks."""', 1),
        ('class C:\n    """As stored, without reading."""', 1),
        ('def f():\n    """Number of all ranks."""', 0),
        ('def f():\n    """Whether it is whole."""', 0),
        ('"""Whatsoever: a name."""', 0),
    ],
)
def test_half_a_sentence_is_found(source: str, count: int) -> None:
    assert len(list(half_sentences(Path("x.py"), ast.parse(source)))) == count


FOREIGN_KEYS = "megatron_vlm/data/sources/record_keys.py"  # names that other people's records have for an image


def other_names_of_images(path: Path, source: str) -> Iterator[str]:
    """The glossary's "image" by another word: in names and comments, and outside tests in texts."""
    if "picture" not in source.lower():
        return
    kinds = {tokenize.NAME, tokenize.COMMENT} | ({tokenize.STRING} if path.parts[0] != "tests" else set())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds and "picture" in token.string.lower():
            yield f"{path}:{token.start[0]} says picture; a still image is an image, a drawing a drawing"


def test_an_image_has_one_name() -> None:
    files = [path for path in python_files(*TOP_FOLDERS) if str(path) != FOREIGN_KEYS]
    found = [line for path in files for line in other_names_of_images(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("megatron_vlm/x.py", "def read_pictures(path): ...", 1),
        ("megatron_vlm/x.py", "raise ValueError(f'{path}: the picture is damaged')", 1),
        ("megatron_vlm/x.py", "size = 3  # of a Picture", 1),
        ("megatron_vlm/x.py", "image = read(path)  # of an image", 0),
        ("tests/x.py", "PICTURE = 3", 1),
        ("tests/x.py", "ask('which picture shows it?')", 0),
    ],
)
def test_another_name_of_an_image_is_found(path: str, source: str, count: int) -> None:
    assert len(list(other_names_of_images(Path(path), source))) == count


OWN_FILES = (  # what they open was written by this process or its child a moment ago
    "megatron_vlm/checkpoint/integrity.py",
    "megatron_vlm/data/text/tokenizer.py",
    "megatron_vlm/training/layout_check/reference.py",
)


def plain_reads(path: Path, tree: ast.Module) -> Iterator[str]:
    """Files read without the one rule: by `open` for reading, or pathlib's own readers."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = node.func.id if isinstance(node.func, ast.Name) else None
        modes = [one.value for one in [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
                 if isinstance(one, ast.Constant) and isinstance(one.value, str)]  # fmt: skip
        opens = named == "open" and not any(set(mode) & set("wax") for mode in modes)
        reads = (
            isinstance(node.func, ast.Attribute)
            and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "files")
            and (node.func.attr == "read_text" or (node.func.attr == "read_bytes" and not node.args))
        )
        if opens or reads:
            yield f"{path}:{node.lineno} reads a file plainly; megatron_vlm/runtime/files.py refuses pipes and devices"


def test_files_of_others_are_read_by_one_rule() -> None:
    found = [
        line
        for path in python_files("megatron_vlm")
        if path.parts[1] != "runtime" and str(path) not in OWN_FILES
        for line in plain_reads(path, tree_of(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("open(p)", 1),
        ("open(p, 'rb')", 1),
        ("open(p, mode='r')", 1),
        ("p.read_text(encoding='utf-8')", 1),
        ("p.read_bytes()", 1),
        ("open(p, 'wb')", 0),
        ("open(p, 'a+')", 0),
        ("files.read_text(p)", 0),
        ("self.file.read_bytes(extent)", 0),
    ],
)
def test_the_reading_rule_can_fail(source: str, count: int) -> None:
    assert len(list(plain_reads(Path("x.py"), ast.parse(source)))) == count


def test_no_print_outside_command_lines_and_examples() -> None:
    files = [path for path in python_files("megatron_vlm", "kernels") if path.parts[1] != "cli"]
    found = [line for path in files for line in prints(path, tree_of(path))]
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
