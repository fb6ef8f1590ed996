"""What a Markdown document claims about this repository: paths, and functions as `path/file.py:function`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.sources import ROOT

MADE_WHILE_RUNNING = ("runs/", ".venv/", "build/", "dist/")
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".sbatch", ".cfg")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PATH = re.compile(r"\.?[\w-][\w.-]*(?:/[\w.*-]+)*/?")
DECISION = re.compile(r"docs/decisions/\d{4}")
REFERENCE = re.compile(r"([\w./-]+\.py):([A-Za-z_][\w.]*)")


def named_paths(text: str) -> Iterator[str]:
    """Paths inside the repository that the text names: in code spans, in links, and as words of code blocks."""
    blocks, prose = FENCE.findall(text), FENCE.sub("", text)
    words = [word for span in SPAN.findall(prose) for word in span.split()]
    words += [word for block in blocks for word in block.split()]
    for word in words:
        candidate = word.strip("()[]{}\"',;").removesuffix(".").partition(":")[0]
        if PATH.fullmatch(candidate) and _is_ours(candidate):
            yield candidate
    for target in LINK.findall(prose):
        if "://" not in target and not target.startswith("mailto:"):
            yield target


def _is_ours(candidate: str) -> bool:
    """A path and not a hub id, an option or a file the program makes: its first part is a folder here, or it is a lone
    file name with a suffix we use, not in capitals (RECIPE.yaml stands for any)."""
    if candidate.startswith(MADE_WHILE_RUNNING):
        return False
    first, slash, _ = candidate.partition("/")
    if slash:
        return (ROOT / first).is_dir() or (ROOT / "megatron_vlm" / first).is_dir()
    stem = candidate.rpartition(".")[0]
    return candidate.endswith(SUFFIXES) and stem.upper() != stem


def exists(path: str, beside: Path = ROOT) -> bool:
    """From the document's folder, from the root or the package, as a pattern, as a decision's number, or, for a lone
    file name, anywhere in the repository."""
    if (beside / path).exists():
        return True
    if "/" not in path.rstrip("/"):
        return (ROOT / path).exists() or any(_tracked(path))
    pattern = f"{path}-*.md" if DECISION.fullmatch(path) else path.rstrip("/")
    return any(any(base.glob(pattern)) for base in (ROOT, ROOT / "megatron_vlm"))


def _tracked(name: str) -> Iterator[Path]:
    for folder in ("megatron_vlm", "kernels", "tools", "examples", "tests", "docs"):
        yield from (ROOT / folder).rglob(name)


def references(text: str) -> list[tuple[str, str]]:
    """(`path/file.py`, `function`) for every `path/file.py:function` or `path/file.py:Class.method` in a code span."""
    return [found.groups() for span in SPAN.findall(text) if (found := REFERENCE.fullmatch(span))]  # type: ignore[misc]


def defines(path: str, name: str) -> bool:
    """Whether that file has a function, class, method or variable at its top of that name."""
    for base in (ROOT, ROOT / "megatron_vlm"):
        if (base / path).is_file():
            return _find(ast.parse((base / path).read_text()), name.split("."))
    return False


def _find(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, names: list[str]) -> bool:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == names[0]:
            return len(names) == 1 or _find(child, names[1:])
        if isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            if names in [[target.id] for target in targets if isinstance(target, ast.Name)]:
                return True
    return False
