"""SIGTERM and SIGUSR1 to every process of a job: it ends its step, saves, and ends well; a rerun goes on exactly."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import load_config, to_yaml
from megatron_vlm.config.schema import Config
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.jobs import train_steps
from tests.helpers.ranks.live_jobs import GONE_SECONDS, TRAIN, LiveJob, read_metrics, wait_for
from tests.helpers.ranks.pool import RankPool

NEVER = 1_000_000  # steps: more than any job here makes


def a_recipe(tmp_path: Path) -> Path:
    """A job without end, saving now and then, with two data workers per rank."""
    config = tiny_recipe(
        tmp_path,
        training={"steps": NEVER},
        optimizer={"distributed": True},
        schedule={"warmup_ratio": 0.0},
        data={"num_workers": 2},
        checkpoint={"every_steps": 5},
        logging={"tensorboard": False, "ranks_every_steps": 0},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(config))
    return path


def stop(job: LiveJob, root: Path, number: signal.Signals) -> None:
    """Signals all its processes at once, some steps into the run, torchrun's agent among them."""
    wait_for("three steps", lambda: len(read_metrics(root)) >= 3)
    for process in job.processes():
        process.send_signal(number)


def check_stopped(job: LiveJob, root: Path, name: str) -> int:
    """The steps it made; it told so once, and its last checkpoint has them all."""
    (told,) = re.findall(rf"stopped by {name} after (\d+) of {NEVER} steps, saved in (\S+)", job.stdout)
    steps, checkpoint = int(told[0]), Path(told[1])
    assert checkpoint == root / f"step_{steps:07d}" and (root / "latest").read_text() == checkpoint.name
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == steps == len(read_metrics(root))
    assert not list(root.glob(".partial*"))
    return steps


@pytest.mark.slow
def test_one_process_and_its_workers(tmp_path: Path) -> None:
    recipe, root = a_recipe(tmp_path), tmp_path / "checkpoints"
    with LiveJob(tmp_path / "logs", [TRAIN, recipe]) as job:
        stop(job, root, signal.SIGTERM)
        assert (job.end(), job.read("stderr.log")) == (0, "")
        check_stopped(job, root, "SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_two_ranks_stop_at_one_step_and_go_on_exactly(ranks: RankPool, tmp_path: Path, name: str) -> None:
    recipe, root = a_recipe(tmp_path), tmp_path / "checkpoints"
    with LiveJob(tmp_path / "logs", [TRAIN, recipe], num_ranks=2) as job:
        stop(job, root, signal.Signals[name])
        code = job.end()
        assert job.read("stderr.log") == ""
        assert code == 0 or name == "SIGTERM", "torchrun itself ends with an error when it is told to end"
        steps = check_stopped(job, root, name)
    changes = {"data": {"num_workers": 0}}
    undisturbed = ranks.run(2, losses_of, steps + 2, tree(recipe, tmp_path / "undisturbed", changes))[0]
    assert [line["loss"] for line in read_metrics(root)] == undisturbed[:steps]
    assert ranks.run(2, losses_of, 2, tree(recipe, root, changes))[0] == undisturbed[steps:]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    recipe, root = a_recipe(tmp_path), tmp_path / "checkpoints"
    with LiveJob(tmp_path / "logs", [TRAIN, recipe], num_ranks=2) as job:
        wait_for("three steps", lambda: len(read_metrics(root)) >= 3)
        listeners = [process for process in job.listening(signal.SIGUSR1) if str(TRAIN) in process.cmdline()]
        last = max(listeners, key=lambda process: int(process.environ()["RANK"]))
        last.send_signal(signal.SIGUSR1)
        assert (job.end(), job.read("stderr.log")) == (0, "")
        check_stopped(job, root, "SIGUSR1")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_before_the_first_step_it_ends_at_once_and_saves_nothing(tmp_path: Path, num_ranks: int) -> None:
    recipe, root = a_recipe(tmp_path), tmp_path / "checkpoints"
    with LiveJob(tmp_path / "logs", [TRAIN, recipe], num_ranks) as job:
        wait_for("the ranks", lambda: len(job.listening(signal.SIGUSR1)) == num_ranks)
        for process in job.processes():
            process.send_signal(signal.SIGUSR1)
        assert (job.end(limit_seconds=GONE_SECONDS), job.read("stderr.log")) == (0, "")
        assert "stopped by SIGUSR1 before the first step: nothing to save" in job.stdout
    assert not root.exists()


def tree(recipe: Path, root: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its checkpoints elsewhere."""
    overrides = [f"{section}.{key}={value}" for section, keys in changes.items() for key, value in keys.items()]
    return load_config(recipe, [f"checkpoint.directory={root}", *overrides]).model_dump(mode="json")


def losses_of(steps: int, recipe: dict[str, Any]) -> list[float]:
    """Inside a rank: the next steps of a run."""
    import torch.distributed as dist

    from megatron_vlm.training.job import build_job

    return train_steps(build_job(Config.model_validate(recipe), dist.get_world_size(), resumes=True), steps)[0]
