"""The wheel, built as pip builds it, and an environment that has it and others' packages, but not this checkout."""

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from tests.helpers.ranks.processes import ROOT, environment

BUILT_FROM = ("megatron_vlm", "kernels", "examples/recipes", "setup.py", "pyproject.toml", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """The wheel, in `folder`, of a copy of the checkout: what an earlier build left in build/ would get into it."""
    copy = folder / "copy"
    for name in BUILT_FROM:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Installation:
    """A virtual environment, `folder`."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, cwd: Path, *command: str | Path, seconds: float = 300) -> str:
        """What a command prints whose program is of the environment (`python`, `megatron-vlm`), in a folder that has
        nothing of the checkout. It must end with 0."""
        variables = {name: value for name, value in environment().items() if not name.startswith("PYTHON")}
        variables["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{variables['PATH']}"
        words = [str(self.folder / "bin" / command[0]), *map(str, command[1:])]
        done = subprocess.run(
            words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def install(wheel: Path, folder: Path) -> Installation:
    """A new environment with the wheel, and with the packages of the running one that are not ours."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    others = Path(str(distribution("torch").locate_file("")))  # whose own .pth files are not followed
    (site / "others.pth").write_text(f"{others}\n")
    # Ignored, since an editable install of the checkout may be among what `others` has.
    _pip("--python", folder / "bin" / "python", "install", "--ignore-installed", "--no-deps", "--no-index", wheel)
    return Installation(folder)


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    variables = {name: value for name, value in environment().items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
