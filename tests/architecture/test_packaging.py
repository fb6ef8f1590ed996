"""setup.py's ranges and constraints-cpu.txt's pins belong together, and packaging finds every package."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from tests.architecture.sources import ROOT

CUDA_SOURCES = (".cu", ".cuh", ".c", ".cc", ".cpp", ".h")
INSTALLED_BY_MAKE = ("kernels", "quickstart", "test", "dev")


def declared() -> dict[str, list[Requirement]]:
    """Requirements by extra; those of everybody under `required`. setup.py is read, not run."""
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "ROOT"
    }
    lists = {"required": values["REQUIRED"], **values["EXTRAS"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(parts) == 2 for parts in found), "only exact pins"
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("extra", ["required", *INSTALLED_BY_MAKE])
def test_pins_are_in_range(extra: str) -> None:
    known = pins()
    for requirement in declared()[extra]:
        version = known.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints-cpu.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_megatron_core_stays_on_the_line_for_python_311() -> None:
    (core,) = [r for r in declared()["required"] if r.name == "megatron-core"]
    assert str(core.specifier) == "<0.17,>=0.16.1"


def test_make_installs_the_pinned_torch() -> None:
    assert f"TORCH := torch=={pins()['torch']}#" in (ROOT / "Makefile").read_text()


def test_every_folder_with_code_is_a_package() -> None:
    packages = set(find_packages(str(ROOT), include=["megatron_vlm", "megatron_vlm.*"]))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_vlm").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == packages
    assert find_packages(str(ROOT / "kernels")) == ["megatron_vlm_kernels"]


def test_kernels_are_triton_s_alone() -> None:
    """Who adds another source adds a slow test that compiles it for sm_90 with nvcc, and keeps the wheel buildable."""
    others = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in CUDA_SOURCES]
    assert not others, others


def test_the_wheel_builds_without_a_compiler_and_carries_the_kernels(tmp_path: Path) -> None:
    """No nvcc and no C compiler on PATH; for any platform."""
    nothing = {name: str(tmp_path / "none") for name in ("PATH", "CUDA_HOME", "CUDA_PATH", "CC", "CXX")}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path]
    command += ["bdist_wheel", "--dist-dir", tmp_path / "dist", "--bdist-dir", tmp_path / "bdist"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **nothing}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assert len(kernels) > 5 and kernels <= names and "kernels/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "tools/")) or name.endswith(".so")]
