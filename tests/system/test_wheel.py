"""The wheel in an environment that has nothing else of ours: it is whole, and works from another folder."""

import zipfile
from pathlib import Path

import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT
from tests.helpers.wheels import Installation, build_wheel, install

pytestmark = pytest.mark.timeout(900)
TORCHRUN = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_vlm")
WHERE = "import megatron_vlm, megatron_vlm_kernels as k; print(megatron_vlm.__file__, k.__file__, sep='\\n')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return install(wheel, tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a recipe that trains two steps of a tiny model."""
    config = tiny_recipe(tmp_path, training={"steps": 2}, logging={"tensorboard": False, "curves": False})
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    return tmp_path


def test_it_has_everything_but_benchmarks_and_scripts(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = {"megatron_vlm": "megatron_vlm", "kernels": "", "examples/recipes": "megatron_vlm/recipes"}
    expected = {
        (Path(inside) / path.relative_to(ROOT / folder)).as_posix()
        for folder, inside in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {"megatron_vlm/py.typed", "megatron_vlm/cli/layout_page/page.css"} < names
    assert not [name for name in names if "bench" in name.lower()]


def test_two_ranks_train_with_torchrun(installed: Installation, elsewhere: Path) -> None:
    """The farthest from a checkout: ranks that torchrun starts by the package's name, and processes that they start."""
    where = installed.run(elsewhere, "python", "-c", WHERE).splitlines()
    assert all(path.startswith(str(installed.folder)) for path in where), where
    told = installed.run(elsewhere, *TORCHRUN, "train", "recipe.yaml", "parallel.tensor=2")
    assert "2 steps to step 2 of 2" in told, told
    assert list(elsewhere.rglob("step_0000002/manifest.json"))


@pytest.mark.slow
def test_train_and_generate(installed: Installation, elsewhere: Path) -> None:
    launch = ("megatron-vlm", "launch", "--local", "--max-restarts", "0", "--ranks", "2", "--")
    installed.run(elsewhere, "megatron-vlm", "train", "recipe.yaml")
    (checkpoint,) = elsewhere.rglob("step_0000002")
    asked = ("generate", checkpoint, "--prompt", "?", "--max-new-tokens", "1", "--device", "cpu")
    alone = installed.run(elsewhere, "megatron-vlm", *asked)
    assert alone.count("\n") == 1
    assert f"\n{alone}" in installed.run(elsewhere, *launch, *asked, "--tensor", "2")  # among the launcher's own lines
    installed.run(elsewhere, *launch, "train", "recipe.yaml", "--check-layout", "parallel.tensor=2")


@pytest.mark.slow
def test_what_needs_its_files(installed: Installation, elsewhere: Path) -> None:
    """The page's style, ranges of versions, shipped recipes with their bases."""
    page = ("recipe.yaml", "--world-size", "2", "parallel.tensor=2", "--html", "page.html")
    installed.run(elsewhere, "megatron-vlm", "show-layout", *page)
    assert "<style>" in (elsewhere / "page.html").read_text()
    assert "megatron-core 0.16" in installed.run(elsewhere, "megatron-vlm", "doctor", "recipe.yaml")
