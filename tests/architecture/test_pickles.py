"""Files of others are read as data: no plain unpickling, no code that comes with a model, `.metadata` in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_vlm", "tools", "examples", "kernels")
PICKLES = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "pandas")
PLAIN = ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler", "read_pickle")
RUNS = {f"{module}.{name}" for module in PICKLES for name in PLAIN} | {
    f"yaml.{name}"
    for name in ("unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader", "FullLoader")
}
READERS = ("FileSystemReader", "_EmptyStateDictLoadPlanner")
SAFE = {  # a call, and what makes it safe
    "torch.load": ("weights_only", ("True",)),
    "yaml.load": ("Loader", ("yaml.SafeLoader", "yaml.CSafeLoader")),
    "yaml.load_all": ("Loader", ("yaml.SafeLoader", "yaml.CSafeLoader")),
}
ALLOWED = {
    ("megatron_vlm/data/fetch/workers.py", "pickle.loads"),  # from a child of this process
    ("megatron_vlm/checkpoint/reading.py", "FileSystemReader"),  # which is given what was read already
}


def faults(path: str, source: str) -> Iterator[str]:
    """Names and calls that would read a file of anybody in a way that can run code."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        for found in _of(node, names):
            if (path, found) not in ALLOWED:
                yield f"{path}: {found}"


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What an import binds, and what that is called where it comes from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    first, *rest = ast.unparse(node).split(".")
    return ".".join([names.get(first, first), *rest])


def _of(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Name | ast.Attribute):
        dotted = _dotted(node, names)
        if dotted in RUNS:
            yield dotted
        if dotted.rpartition(".")[2] in READERS:
            yield dotted.rpartition(".")[2]
    elif isinstance(node, ast.ImportFrom):
        yield from (
            f"{node.module}.*" for alias in node.names if alias.name == "*" and node.module in (*PICKLES, "yaml")
        )
        yield from (alias.name for alias in node.names if alias.name in READERS)
    elif isinstance(node, ast.Call):
        called, keywords = _dotted(node.func, names), {one.arg: _dotted(one.value, names) for one in node.keywords}
        if called in SAFE and keywords.get(SAFE[called][0]) not in SAFE[called][1]:
            yield f"{called} without {SAFE[called][0]}={SAFE[called][1][0]}"
        for name in ("trust_remote_code", "allow_pickle"):
            if keywords.get(name, "False") != "False":
                yield f"{name}="


def test_nothing_is_unpickled_plainly() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    assert [fault for path in files for fault in faults(str(path.relative_to(ROOT)), path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "from pickle import loads\nloads(content)",
        "import pickle as p\np.load(file)",
        "from pickle import Unpickler as Reader\nclass Own(Reader): pass",
        "from pickle import *",
        "import joblib\njoblib.load(path)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "torch.load(path, weights_only=chosen)",
        "import yaml\nyaml.load(text)",
        "from yaml import load, FullLoader\nload(text, Loader=FullLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "class Own(pickle.Unpickler): pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "from torch.distributed.checkpoint import FileSystemReader",
    ],
)
def test_the_rule_can_fail(source: str) -> None:
    assert list(faults("megatron_vlm/x.py", source))


def test_what_is_safe_passes() -> None:
    source = "import torch, yaml\nfrom yaml import SafeLoader\n"
    source += (
        "torch.load(path, weights_only=True)\nyaml.load(text, Loader=SafeLoader)\nyaml.safe_load(text)\njson.load(file)"
    )
    assert not list(faults("megatron_vlm/x.py", source))
