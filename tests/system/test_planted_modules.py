"""A working directory is anybody's: modules that lie there are imported by no process that a tool or `load` starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT, environment

PLANTED = ("logging", "torch", "socket", "selectors", "multiprocessing", "json")
ASK = """
import sys
from megatron_vlm import load
with load(sys.argv[1], devices=["cpu", "cpu"]) as assistant:
    assistant.generate("?", max_new_tokens=1)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory of modules that tell when they are imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + '\\n')\n1 / 0\n")
    return folder


def run_in(hostile: Path, *command: str | Path) -> None:
    """It goes well there, and nothing planted has run."""
    clean = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=hostile, env=clean, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    ran = hostile.parent / "ran"
    assert not ran.exists(), ran.read_text()
    assert done.returncode == 0, done.stderr


def tool(name: str) -> Path:
    return ROOT / "tools" / f"{name}.py"


def test_the_plants_work(hostile: Path) -> None:
    """Python's own `-c` imports them."""
    with pytest.raises(AssertionError, match="logging"):
        run_in(hostile, "-c", "import logging")


def test_ranks_behind_a_call(hostile: Path, tmp_path: Path) -> None:
    from tests.helpers.models.verify_models import Shape, draw, save_llava_hf

    model = save_llava_hf(draw(Shape(text={"num_hidden_layers": 4})), tmp_path / "model")
    (tmp_path / "ask.py").write_text(ASK)
    run_in(hostile, tmp_path / "ask.py", model)
    run_in(hostile, tool("generate"), model, "--prompt", "?", "--max-new-tokens", "1", "--devices", "cpu", "cpu")


def test_workers_and_the_writer_of_a_checkpoint(hostile: Path, tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, training={"steps": 2}, data={"num_workers": 1}, logging={"tensorboard": False})
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    run_in(hostile, tool("train"), tmp_path / "recipe.yaml")
    elsewhere = f"checkpoint.directory={tmp_path / 'again'}"
    run_in(hostile, "-m", "megatron_vlm", "train", tmp_path / "recipe.yaml", elsewhere)
    ranks = ["--local", "--max-restarts", "0", "--ranks", "2", "--", tool("train")]
    run_in(hostile, tool("launch"), *ranks, tmp_path / "recipe.yaml", "--check-layout")


def test_the_doctors_probes(hostile: Path) -> None:
    run_in(hostile, tool("doctor"))
