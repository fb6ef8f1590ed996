"""Each dependency has a reason, and one that nobody needs is none: what is imported against what setup.py declares."""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.architecture.sources import ROOT, imports, python_files, tree_of

LINE = re.compile(r'"(?P<name>[a-z][\w-]*)(?:\[\w+\])?(?P<range>[<>=][^"]*)"(?P<more>[^#\n]*)(?:#(?P<reason>.*))?')
OTHERS_NEED = re.compile(r" needed by ([\w-]+) ")
TO_COME = " to come: "
NAMES = {  # import name -> name in setup.py, where it is not the same with other hyphens
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "megatron": "megatron-core",
    "pydantic_core": "pydantic",  # its other half, which it pins
    "flash_attn": "flash-attn",
}
OURS = {"megatron_vlm", "megatron_vlm_kernels", "tools", "tests", "drawings", "benchmarks"}
NOT_IMPORTED = {"flash-attn"}  # its library is called through torch.ops, see megatron_vlm/ops/attention_cuda.py
WORKSHOP = ("test", "dev")  # extras of programs that the Makefile starts


def declared(text: str) -> dict[str, tuple[str, str]]:
    """Name -> (extra or "required", reason), of setup.py's lists."""
    found, extra = {}, "required"
    for line in text[text.index("REQUIRED = [") : text.index("\nRECIPES")].splitlines():
        if opens := re.match(r'    "([\w-]+)": \[', line):
            extra = opens[1]
        for match in LINE.finditer(line.partition(": [")[2] if opens else line):
            found[match["name"]] = (extra, match["reason"] or "")
    return found


def imported(files: Iterable[Path]) -> set[str]:
    """Names in setup.py of what these files import from others."""
    modules = {found.module.split(".")[0] for path in files for found in imports(tree_of(path), path)}
    return {NAMES.get(name, name.replace("_", "-")) for name in modules - sys.stdlib_module_names - OURS}


def faults(known: Mapping[str, tuple[str, str]], used: set[str], used_anywhere: set[str]) -> list[str]:
    """What is wrong with the declarations. `used`: by the package; `used_anywhere`: by tools and examples too."""
    found = [f"setup.py declares no {name}, which the package imports" for name in sorted(used - set(known))]
    for name, (extra, reason) in known.items():
        if not reason.strip():
            found.append(f"setup.py: {name} has no reason beside it")
        needed_by = OTHERS_NEED.match(reason)
        others = needed_by is not None and needed_by[1] in known
        if extra in WORKSHOP or name in used_anywhere | NOT_IMPORTED or others or reason.startswith(TO_COME):
            continue
        found.append(f"setup.py: {name} is imported by nobody, and its reason names no other and nothing to come")
    return found


def test_what_is_declared_is_needed_and_what_is_needed_declared() -> None:
    known = declared((ROOT / "setup.py").read_text())
    package = python_files("megatron_vlm", "kernels")
    found = faults(known, imported(package), imported([*package, *python_files("tools", "examples")]))
    assert not found, "\n".join(found)


def test_every_line_of_setup_is_read() -> None:
    text = (ROOT / "setup.py").read_text()
    quoted = re.findall(r'"([a-z][\w-]*(?:\[\w+\])?[<>=][^"]*)"', text[: text.index("setup(")])
    assert set(declared(text)) == {Requirement(line).name for line in quoted if not line.startswith("python")}


SETUP = """
REQUIRED = [
    "torch>=2",  # tensors
    {line}
]
EXTRAS = {{
    "gpu": ["fast>=1"],  # speed
    "test": ["pytest>=8"],  # make test
}}

RECIPES = ""
"""


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("", []),
        ('"einops>=1",  # needed by torch for nothing', []),
        ('"tar>=1",  # to come: tar shards', []),
        ('"einops>=1",  # needed by nobody for nothing', ["einops is imported by nobody"]),
        ('"tar>=1",  # tar shards', ["tar is imported by nobody"]),
        ('"numpy>=1",', ["numpy has no reason"]),
        ('"numpy[all]>=1",  # pixels', []),
    ],
)
def test_the_rule_can_fail(line: str, fault: list[str]) -> None:
    known = declared(SETUP.format(line=line))
    assert {"torch", "fast", "pytest"} <= set(known) and known["fast"] == ("gpu", " speed")
    used = {"torch", "fast"} | {name for name in known if name == "numpy"}
    found = faults(known, used, used)
    assert len(found) == len(fault) and all(part in told for part, told in zip(fault, found, strict=True))


def test_what_is_imported_and_not_declared_is_found() -> None:
    assert faults({}, {"left-out"}, set()) == ["setup.py declares no left-out, which the package imports"]
