"""The Dockerfile: linted, keeping the image's torch, and bound to nobody's package index."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE_PACKAGES = """\
apex==0.1
flash_attn==2.8.1
numpy==2.1.0
nvidia-dali-cuda130==1.52.0
pytorch-triton==3.6.0+git
torch==2.12.0a0+git
torchvision==0.27.0a0
transformer_engine==2.9.0
"""
OTHER_PACKAGES = "torchx==1.0\ntransformers==4.57.0\nnumpydoc==1.0\npydantic==2.10\nsafetensors==0.4\n"


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")  # of the `dev` extra
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_what_was_built_with_the_images_torch_is_held_and_nothing_else() -> None:
    pattern = re.search(r"grep -iE '([^']+)'", DOCKERFILE)
    assert pattern
    found = subprocess.run(
        ["grep", "-iE", pattern[1]], input=IMAGE_PACKAGES + OTHER_PACKAGES, capture_output=True, text=True, check=True
    )
    assert found.stdout == IMAGE_PACKAGES


def test_no_package_index_is_named() -> None:
    assert not re.search(r"index-url|find-links|trusted-host|pypi|pythonhosted", DOCKERFILE, re.IGNORECASE)


def test_it_runs_as_a_plain_user_after_a_smoke_test() -> None:
    after = DOCKERFILE.partition("\nUSER ")[2]
    assert after and not after.startswith(("root", "0")) and "tools/doctor.py" in after


def test_home_and_caches_can_be_written_and_are_off_the_users_mount() -> None:
    folders = dict(re.findall(r"\b(HOME|HF_HOME)=(\S+)", DOCKERFILE))
    assert folders.keys() == {"HOME", "HF_HOME"}
    assert not any(folder.startswith("/workspace") for folder in folders.values())
    made = re.search(r"mkdir -p (.*) && chmod -R a\+rwX (.*)", DOCKERFILE)
    assert made and made[1] == made[2] == '/workspace "$HOME" "$HF_HOME"'
    mounts = re.findall(r"-v \S+?:(/[^\"]+)", (ROOT / "docs" / "running.md").read_text())
    assert mounts and set(mounts) == {"/workspace", folders["HF_HOME"]}


@pytest.mark.parametrize("torch_kept", [True, False])
def test_the_smoke_test_passes_where_the_images_torch_is_kept(tmp_path: Path, torch_kept: bool) -> None:
    """As the image's shell runs it, the programs stood in for: pip lists hundreds of packages after torch."""
    shell = re.search(r"^SHELL (\[.+\])$", DOCKERFILE, re.MULTILINE)
    step = re.search(r"^RUN ((?:.*\\\n)*.*)", DOCKERFILE.partition("\nUSER ")[2], re.MULTILINE)
    assert shell and step
    listed = ["torch==2.12.0a0+git" if torch_kept else "torch==2.12.0", *(f"p{n}==1" for n in range(50_000))]
    (tmp_path / "list").write_text("\n".join(listed) + "\n")
    (tmp_path / "constraints").write_text("torch==2.12.0a0+git\n")
    for name, program in {"pip": f'[ "$1" != list ] || cat {tmp_path}/list', "python": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PIP_CONSTRAINT": str(tmp_path / "constraints")}
    command = [*json.loads(shell[1]), step[1].replace("/tmp/packages.txt", str(tmp_path / "found"))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == torch_kept, done.stderr


def test_the_context_leaves_out_what_git_ignores() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored <= left_out, sorted(ignored - left_out)
