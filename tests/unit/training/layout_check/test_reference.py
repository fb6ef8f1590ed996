"""The child that a layout is compared with: when it fails, when it is late, when nobody waits for it any more."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ParallelError
from megatron_vlm.runtime.device import prepare
from megatron_vlm.training.layout_check.reference import ReferenceProcess, one_process
from tests.helpers.models.tiny import tiny_recipe

PARENT = """
import sys, pathlib, time
from megatron_vlm.config.schema import Config
from megatron_vlm.runtime.device import prepare
from megatron_vlm.training.layout_check.reference import ReferenceProcess
prepare("cpu")
folder = pathlib.Path(sys.argv[1])
recipe = Config.model_validate_json((folder / "recipe.json").read_text())
print(ReferenceProcess(recipe, folder).process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Config:
    prepare("cpu")
    return tiny_recipe(tmp_path)


def test_the_recipe_of_one_process(tmp_path: Path, recipe: Config) -> None:
    sections = {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence": True},
        "training": {"media_window": 2, "media_batch": 2, "micro_batch_size": 2, "recompute": {"language": "full"}},
    }
    shared, alone = one_process(tiny_recipe(tmp_path, **sections)), one_process(recipe)
    assert shared == alone
    assert alone.training.global_batch_size == recipe.training.global_batch_size


@pytest.mark.slow
def test_its_failure_is_told_in_its_own_words(tmp_path: Path, recipe: Config) -> None:
    missing = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "nowhere.json"})})
    child = ReferenceProcess(missing, tmp_path)
    with pytest.raises(ParallelError, match="^the one process to compare with failed: data file nowhere.json cannot"):
        child.record(120)


def test_its_lateness_is_an_error_and_it_is_ended(tmp_path: Path, recipe: Config) -> None:
    child = ReferenceProcess(recipe, tmp_path)
    with pytest.raises(ParallelError, match="no end after 0 s"):
        child.record(0)
    child.close()
    assert not psutil.pid_exists(child.process.pid)


@pytest.mark.slow
def test_it_ends_with_its_parent(tmp_path: Path, recipe: Config) -> None:
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(120)  # at the latest when it has imported everything and begins to watch
    assert not (tmp_path / "one.pt").exists()
