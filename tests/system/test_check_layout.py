"""`tools/train.py --check-layout` as users start it: the quickstart passes, faults cost one line and the exit code."""

from pathlib import Path

import pytest

from examples.quickstart.make_data import make_data
from megatron_vlm.config.loading import to_yaml
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.live_jobs import TRAIN, LiveJob
from tests.helpers.ranks.processes import ROOT

FAULTY_TRAIN = ROOT / "tests" / "helpers" / "faults" / "faulty_train.py"
LIMIT_SECONDS = 300.0


def run(logs: Path, *command: str | Path, num_ranks: int = 1) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of our own processes, all of which have ended."""
    with LiveJob(logs, command, num_ranks) as job:
        return job.end(LIMIT_SECONDS), job.read("stdout.log"), job.read("stderr.log")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_the_quickstart_passes(tmp_path: Path, phase: str) -> None:
    make_data(tmp_path / "data")
    overrides = [
        f"data.path={tmp_path / 'data' / 'train.json'}",
        f"model.language.tokenizer={tmp_path / 'data' / 'tokenizer'}",
        f"checkpoint.directory={tmp_path / 'run'}",
    ]
    before = sorted(tmp_path.rglob("*"))
    recipe = ROOT / "examples" / "recipes" / f"quickstart_{phase}.yaml"
    code, stdout, stderr = run(tmp_path / "logs", TRAIN, recipe, *overrides, "--check-layout", num_ranks=4)
    assert (code, stderr) == (0, "")
    assert stdout.count("   equal") == 12 and "DIFFERS" not in stdout
    after = [path for path in tmp_path.rglob("*") if "logs" not in path.parts]
    assert sorted(after) == before, "something was written beside the user's files"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            "swapped_feature_rows",
            "error: the layout differs from one process, first in exchange: value of language.embedding, sample '",
        ),
        ("idle_rank_skips_exchange", "error: the layout hangs: step 1 hangs in exchange: rank 0 there ("),
    ],
    ids=["numbers", "hang"],
)
def test_a_fault_costs_one_line(tmp_path: Path, fault: str, line: str) -> None:
    parallel, training = {"tensor": 2, "pipeline": 2}, {"media_window": 2}
    recipe = tiny_recipe(tmp_path, parallel=parallel, training=training, runtime={"timeout_seconds": 20})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    arguments = [fault, tmp_path / "recipe.yaml", "--check-layout"]
    code, stdout, stderr = run(tmp_path / "logs", FAULTY_TRAIN, *arguments, num_ranks=4)
    assert code != 0
    assert stderr.startswith(line) and stderr.count("\n") == 1
    assert ("   DIFFERS" in stdout) == (fault == "swapped_feature_rows")


@pytest.mark.slow
def test_a_recipe_that_is_not_valid_is_refused_first(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, parallel={"virtual_pipeline": 2})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    code, _, stderr = run(tmp_path / "logs", TRAIN, tmp_path / "recipe.yaml", "--check-layout")
    assert code == 1
    assert stderr.startswith("error: parallel.virtual_pipeline: found 2") and stderr.count("\n") == 1
