"""Nothing is lost: whatever is killed, and whenever, the run goes on with the losses and samples it would have had."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.directory import checkpoints
from megatron_vlm.config import load_config, to_yaml
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.helpers.ranks.live_jobs import TRAIN, LiveJob, read_metrics, train_in_pool
from tests.helpers.ranks.pool import RankPool
from tests.helpers.ranks.processes import ROOT

KILLED_TRAIN = ROOT / "tests" / "helpers" / "faults" / "killed_train.py"
SEED = 20_261_121  # both ranks are drawn
Metrics = list[dict[str, Any]]


def a_recipe(tmp_path: Path, name: str, steps: int, every_steps: int, **data: Any) -> Path:
    """A job of ranks with a data worker each, its checkpoints in `tmp_path`/`name`."""
    config = tiny_recipe(
        tmp_path,
        training={"steps": steps},
        optimizer={"distributed": True},
        data={"num_workers": 1, **data},
        checkpoint={"directory": str(tmp_path / name), "every_steps": every_steps},
        logging={"sample_ids": True, "tensorboard": False, "ranks_every_steps": 0},
    )
    path = tmp_path / f"{name}.yaml"
    path.write_text(to_yaml(config))
    return path


def undisturbed(ranks: RankPool, recipe: Path, *overrides: str) -> Metrics:
    """The same run, without a kill, in two of the pool's ranks."""
    root = recipe.with_suffix(f".undisturbed{len(overrides)}")
    config = load_config(recipe, [f"checkpoint.directory={root}", "data.num_workers=0", *overrides])
    ranks.run(2, train_in_pool, config.model_dump(mode="json"))
    return read_metrics(root)


def killed(logs: Path, recipe: Path, rank: int, step: int, moment: str, num_ranks: int = 2) -> str:
    """A run in which one rank is killed; what the others told."""
    with LiveJob(logs, [KILLED_TRAIN, str(rank), str(step), moment, recipe], num_ranks) as job:
        assert job.end() != 0
        assert "SIGKILL" in (job.logs / "stderr.log").read_text(), "torchrun names the rank that was killed"
        return job.stdout


def to_the_end(logs: Path, recipe: Path, *overrides: str, num_ranks: int = 2) -> str:
    """A run that goes well; what it told."""
    with LiveJob(logs, [TRAIN, recipe, *overrides], num_ranks) as job:
        assert (job.end(), job.read("stderr.log")) == (0, "")
        return job.stdout


def same_samples(found: Metrics, expected: Metrics) -> None:
    """Every step once, in order, with the samples of the undisturbed run."""
    assert [line["step"] for line in found] == list(range(1, len(expected) + 1))
    assert [line["sample_ids"] for line in found] == [line["sample_ids"] for line in expected]


def losses(metrics: Metrics) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics]


def flip_a_byte(checkpoint: Path) -> str:
    """In the middle of its largest file, whose name it returns."""
    file = max(checkpoint.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def test_killed_during_a_save(ranks: RankPool, tmp_path: Path) -> None:
    """The quick one: half a checkpoint is on the disk, and the run goes on from the one before it, bit for bit."""
    recipe = a_recipe(tmp_path, "run", steps=6, every_steps=2)
    expected = undisturbed(ranks, recipe)
    killed(tmp_path / "killed", recipe, rank=1, step=4, moment="save")
    half = tmp_path / "run" / ".partial_step_0000004"
    assert (half / "__1_0.distcp").stat().st_size and not (half / "manifest.json").exists()
    assert (tmp_path / "run" / "latest").read_text() == "step_0000002"
    told = to_the_end(tmp_path / "again", recipe)
    assert f"going on from {tmp_path}/run/step_0000002" in told
    found = read_metrics(tmp_path / "run")
    same_samples(found, expected)
    assert losses(found) == losses(expected)
    assert not half.exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_mixture_goes_on_with_other_ranks_and_workers(ranks: RankPool, tmp_path: Path) -> None:
    """Of four ranks with a worker each one is killed, and two with three workers each go on: every sample as often as
    its weight says, over two cycles and a bit."""
    sources = {}
    for name, size in (("a", 9), ("b", 2), ("c", 8)):
        records = json.loads(tiny_dataset(tmp_path, size, f"{name}.json").read_text())
        named = [{**record, "id": f"{name}-{number}"} for number, record in enumerate(records)]
        (tmp_path / f"{name}.json").write_text(json.dumps(named))
        sources[name] = {"path": str(tmp_path / f"{name}.json")}
    mixture = {"path": None, "mixture": "a + b*3 + c*0.5", "sources": sources}
    recipe = a_recipe(tmp_path, "run", steps=10, every_steps=2, **mixture)
    expected = undisturbed(ranks, recipe)
    killed(tmp_path / "killed", recipe, rank=2, step=6, moment="step", num_ranks=4)
    told = to_the_end(tmp_path / "again", recipe, "data.num_workers=3")
    assert f"going on from {tmp_path}/run/step_000000" in told and "a mixture of 3 source(s)" in told
    found = read_metrics(tmp_path / "run")
    same_samples(found, expected)
    for (loss, norm), (expected_loss, expected_norm) in zip(losses(found), losses(expected), strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-5)
    ids = [id_ for line in found for id_ in line["sample_ids"]]
    times = {"a": 2, "b": 6, "c": 1}
    cycle = Counter({f"{name}-{n}": times[name] for name, size in (("a", 9), ("b", 2), ("c", 8)) for n in range(size)})
    assert cycle.total() == 38 and Counter(ids[:38]) == Counter(ids[38:76]) == cycle


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_again_and_again(ranks: RankPool, tmp_path: Path) -> None:
    """Three kills at random steps and one during a save; then to the end in the same layout, in two others, and with
    a damaged newest checkpoint."""
    draw = random.Random(SEED)
    recipe, root = a_recipe(tmp_path, "run", steps=16, every_steps=3), tmp_path / "run"
    expected = undisturbed(ranks, recipe)
    for number, last_steps in enumerate([(1, 5), (5, 8), (8, 11)]):
        rank, step = draw.randrange(2), draw.randint(*last_steps)
        print(f"seed {SEED}: rank {rank} is killed in step {step}")
        goes_on = bool(checkpoints(root))
        told = killed(tmp_path / f"kill{number}", recipe, rank, step, "step")
        assert ("going on from" in told) == goes_on
    killed(tmp_path / "kill in save", recipe, rank=0, step=12, moment="save")
    assert (root / ".partial_step_0000012").is_dir()
    for name in ("tp2", "one rank", "damaged"):
        shutil.copytree(root, tmp_path / name)

    assert f"going on from {root}/step_0000009" in to_the_end(tmp_path / "last", recipe)
    same_samples(read_metrics(root), expected)
    assert losses(read_metrics(root)) == losses(expected)

    for name, num_ranks, layout in (("tp2", 2, "parallel.tensor=2"), ("one rank", 1, "parallel.tensor=1")):
        other = tmp_path / name
        overrides = [f"checkpoint.directory={other}", layout]
        told = to_the_end(tmp_path / f"{name} log", recipe, *overrides, num_ranks=num_ranks)
        assert "random numbers start afresh" in told
        found = read_metrics(other)
        same_samples(found, expected)
        for (loss, norm), (expected_loss, expected_norm) in zip(losses(found), losses(expected), strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-5)

    other = tmp_path / "damaged"
    file = flip_a_byte(other / "step_0000009")
    told = to_the_end(tmp_path / "damaged log", recipe, f"checkpoint.directory={other}")
    assert f"step_0000009 is damaged: {file} is not what was saved" in told
    assert f"going on from {other}/step_0000006" in told
    same_samples(read_metrics(other), expected)
    assert losses(read_metrics(other)) == losses(expected)
    assert (other / "damaged_step_0000009").is_dir() and (other / "step_0000009").is_dir()
    assert json.loads((other / "step_0000009" / "manifest.json").read_text())["step"] == 9


@pytest.mark.slow
def test_the_comparison_can_fail(ranks: RankPool, tmp_path: Path) -> None:
    """Another order of samples, and a step made twice, are told from the undisturbed run."""
    recipe = a_recipe(tmp_path, "run", steps=3, every_steps=0)
    expected = undisturbed(ranks, recipe)
    found = undisturbed(ranks, recipe, "data.shuffle=false")
    with pytest.raises(AssertionError):
        same_samples(found, expected)
    assert losses(found) != losses(expected)
    with pytest.raises(AssertionError):
        same_samples([*expected[:2], *expected[1:]], expected)
