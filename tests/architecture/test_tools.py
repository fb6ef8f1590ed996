"""Each command line prints its help, at once: before torch is imported, which takes seconds and may see the GPUs."""

import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if not path.name.startswith("_"))

RUN_HELP = """
import os, runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path[0] = os.path.dirname(sys.argv[0])  # as Python itself has it for a script
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code or 0
assert "torch" not in sys.modules, "--help imports torch"
sys.exit(code)
"""


def run_help(tool: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_HELP, tool], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool: str) -> None:
    result = run_help(f"tools/{tool}")
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()
    assert not result.stderr


def test_the_tools_are_there() -> None:
    assert {
        "bench.py",
        "convert.py",
        "doctor.py",
        "evaluate.py",
        "generate.py",
        "launch.py",
        "show_layout.py",
        "train.py",
    } <= set(TOOLS)
