"""Files of others are read as data: no plain unpickling, no code that comes with a model, `.metadata` in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_vlm", "tools", "examples", "kernels")
PLAIN = {"load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"}  # of pickle
ALLOWED = {
    ("megatron_vlm/data/workers.py", "pickle.loads"),  # from a child of this process
    ("megatron_vlm/checkpoint/reading.py", "FileSystemReader"),  # which is given what was read already
}


def faults(path: str, source: str) -> Iterator[str]:
    """Names and calls that would read a file of anybody in a way that can run code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            found = f"pickle.{node.attr}" if node.attr in PLAIN else None
        elif isinstance(node, ast.Name | ast.alias):
            name = node.id if isinstance(node, ast.Name) else node.name
            found = name if name in ("FileSystemReader", "_EmptyStateDictLoadPlanner") else None
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle"):
            found = next((alias.name for alias in node.names if alias.name in PLAIN), None)
        elif isinstance(node, ast.Call):
            found = _of_a_call(node)
        else:
            continue
        if found is not None and (path, found) not in ALLOWED:
            yield f"{path}: {found}"


def _of_a_call(node: ast.Call) -> str | None:
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    called = ast.unparse(node.func)
    if called == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    return next(
        (f"{name}=" for name in ("trust_remote_code", "allow_pickle") if keywords.get(name, "False") != "False"), None
    )


def test_nothing_is_unpickled_plainly() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    assert [fault for path in files for fault in faults(str(path.relative_to(ROOT)), path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "from pickle import loads",
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
