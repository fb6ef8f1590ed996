"""tools/evaluate.py on a model of another system: where its results go, and that this is known before it is loaded."""

import errno
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vlm.cli.evaluate import find_output
from megatron_vlm.errors import DataError
from tests.helpers.models.tiny import tiny_dataset
from tests.helpers.models.verify_models import Shape, draw, save_llava_hf, save_llava_projector
from tests.helpers.ranks.processes import ROOT, environment


def evaluate(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *map(str, arguments), "--task", "exact_match"]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=180)


@pytest.mark.slow
def test_results_are_left_in_the_working_directory(tmp_path: Path) -> None:
    model, data = save_llava_hf(draw(Shape()), tmp_path / "model"), tiny_dataset(tmp_path, num_samples=3)
    done = evaluate(tmp_path, model, "--data", data, "--max-new-tokens", "2")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "answers in evaluation" in done.stdout
    assert json.loads((tmp_path / "evaluation" / "exact_match.json").read_text())["num_questions"] == 3


@pytest.mark.slow
def test_the_order_of_squares_is_told(tmp_path: Path) -> None:
    model = save_llava_projector(tmp_path / "model", "mlp_downsample")
    asked = (model, "--data", tiny_dataset(tmp_path, num_samples=3), "--max-new-tokens", "2")
    untold = evaluate(tmp_path, *asked)
    assert untold.returncode == 1 and "needs --format-option downsample_order=column or row" in untold.stderr
    assert untold.stderr.count("\n") == 1 and not (tmp_path / "evaluation").exists()
    told = evaluate(tmp_path, *asked, "--format-option", "downsample_order=row")
    assert (told.returncode, told.stderr) == (0, ""), told.stderr


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = evaluate(tmp_path, "nowhere", "--data", "none.json", "--output", tmp_path / "file" / "results")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: evaluation results cannot be written to {tmp_path}/file/results: Not a directory\n"


def test_a_folder_that_may_not_be_entered_is_found_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which root may enter all the same."""

    def closed(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(DataError, match=r"closed/results: Permission denied"):
        find_output(Namespace(output=tmp_path / "closed" / "results"))


def test_nothing_is_made_where_there_is_no_model(tmp_path: Path) -> None:
    done = evaluate(tmp_path, "nowhere", "--data", "none.json")
    assert done.returncode == 1 and done.stderr.startswith("error: no checkpoint at nowhere"), done.stderr
    assert not any(tmp_path.iterdir())
