"""The Dockerfile: linted, keeping the image's torch, and bound to nobody's package index."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_the_context_leaves_out_what_git_ignores() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored <= left_out, sorted(ignored - left_out)
