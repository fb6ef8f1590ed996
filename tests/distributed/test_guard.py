"""Numbers that are not finite: the run ends on every rank with the same words, and nothing of them is ever saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import TrainingError
from megatron_vlm.runtime.launch import Launch
from megatron_vlm.training import loop
from megatron_vlm.training.job import Job, build_job
from tests.helpers.lanes import mostly_slow
from tests.helpers.models.tiny import merge, tiny_recipe
from tests.helpers.ranks.pool import RankPool

STEPS = 6


def poison_gradients(job: Job) -> None:
    """From the third step on the last rank's first projector gradient is not a number."""
    finish, calls = job.vision.finish_grad_sync, [0]

    def poisoned() -> None:
        calls[0] += 1
        if calls[0] >= 3 and job.grid.rank == job.grid.sizes.world - 1:
            next(job.vision.module.projector.parameters()).main_grad.fill_(float("nan"))
        finish()

    job.vision.finish_grad_sync = poisoned


def overflow_a_weight(job: Job) -> None:
    """The third update makes a weight of the last rank's language model infinite, and tells nobody."""
    update, calls = job.optimizer.step, [0]

    def overflowing() -> Any:
        result = update()
        calls[0] += 1
        if calls[0] == 3 and job.grid.rank == job.grid.sizes.world - 1:
            job.language[-1].module.decoder.layers[0].mlp.linear_fc1.weight.data[0, 0] = float("inf")
        return result

    job.optimizer.step = overflowing


def run(recipe: dict[str, Any], plant: Any) -> str:
    """Trains with a fault planted into the job; what the run ended with."""

    def build_faulty(*args: Any, **kwargs: Any) -> Job:
        job = build_job(*args, **kwargs)
        if plant is not None:
            plant(job)
        return job

    original, loop.build_job = loop.build_job, build_faulty
    try:
        loop.train(Config.model_validate(recipe), Launch(rank=dist.get_rank(), world_size=dist.get_world_size()))
    except TrainingError as error:
        return str(error)
    finally:
        loop.build_job = original
    return "ended well"


def guarded(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    """Six steps, a save after each, at most two updates left out in a row."""
    base = {
        "checkpoint": {"directory": str(tmp_path / "run"), "every_steps": 1, "async_save": False},
        "training": {"steps": STEPS, "max_nonfinite_steps": 2},
        "logging": {"tensorboard": False},
    }
    return tiny_recipe(tmp_path, **merge(base, sections)).model_dump(mode="json")


def saved_steps(tmp_path: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "run").glob("step_*"))


@pytest.mark.parametrize(("num_ranks", "async_save"), mostly_slow([(1, False), (2, False), (2, True)], [(2, True)]))
def test_updates_left_out_in_a_row_end_the_run(
    ranks: RankPool, tmp_path: Path, num_ranks: int, async_save: bool
) -> None:
    """What is still being saved when the run ends is good, and kept."""
    recipe = guarded(tmp_path, logging={"sample_ids": True}, checkpoint={"async_save": async_save})
    found = set(ranks.run(num_ranks, run, recipe, poison_gradients))
    (message,) = found
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["updated"] for line in lines] == [True, True, False, False], "the last step is on record too"
    assert message.startswith("training stopped after step 4: loss ") and "gradient norm nan" in message
    assert "2 updates in a row were left out" in message and "training.max_nonfinite_steps 2" in message
    assert ", ".join(lines[-1]["sample_ids"]) in message and "\n" not in message
    assert message.endswith(f"last good checkpoint: {tmp_path / 'run' / 'step_0000003'}")
    assert saved_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("num_ranks", mostly_slow([1, 2], [2]))
def test_a_weight_that_overflowed_is_not_saved(ranks: RankPool, tmp_path: Path, num_ranks: int) -> None:
    """One rank's weight, after a step whose loss and norm were fine."""
    (message,) = set(ranks.run(num_ranks, run, guarded(tmp_path), overflow_a_weight))
    assert "after step 3" in message and "a weight is not finite, so nothing is saved" in message
    assert message.endswith(f"last good checkpoint: {tmp_path / 'run' / 'step_0000002'}")
    assert saved_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("num_ranks", mostly_slow([1, 2], [2]))
def test_a_loss_that_is_no_number_ends_the_run_at_once(ranks: RankPool, tmp_path: Path, num_ranks: int) -> None:
    """The overflow is not looked for where nothing is saved, and shows in the next loss."""
    recipe = guarded(tmp_path, checkpoint={"every_steps": 0})
    (message,) = set(ranks.run(num_ranks, run, recipe, overflow_a_weight))
    assert "after step 4: loss nan" in message and "the loss is not finite" in message
    assert message.endswith("last good checkpoint: none") and saved_steps(tmp_path) == []


def test_an_overflowing_rate_needs_no_planting(ranks: RankPool, tmp_path: Path) -> None:
    """A recipe alone can do it: a rate at which the first update leaves fp32's range."""
    recipe = guarded(tmp_path, optimizer={"lr": 1e39}, schedule={"warmup_ratio": 0.0})
    (message,) = set(ranks.run(1, run, recipe, None))
    assert "not finite" in message and saved_steps(tmp_path) == []


def test_one_update_left_out_is_no_reason_to_stop(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(1, run, guarded(tmp_path), poison_once) == ["ended well"]
    assert saved_steps(tmp_path) == list(range(1, STEPS + 1))


def poison_once(job: Job) -> None:
    """The third and the fifth step's gradients are not finite, the ones between are."""
    finish, calls = job.vision.finish_grad_sync, [0]

    def poisoned() -> None:
        calls[0] += 1
        if calls[0] in (3, 5):
            next(job.vision.module.projector.parameters()).main_grad.fill_(float("inf"))
        finish()

    job.vision.finish_grad_sync = poisoned


def poison_the_first(job: Job) -> None:
    """The very first update is left out, before the optimizer has ever stepped."""
    finish, calls = job.vision.finish_grad_sync, [job.start_step]

    def poisoned() -> None:
        calls[0] += 1
        if calls[0] == 1:
            next(job.vision.module.projector.parameters()).main_grad.fill_(float("nan"))
        finish()

    job.vision.finish_grad_sync = poisoned


@pytest.mark.parametrize("distributed", mostly_slow([True, False], [True]))
def test_a_first_update_left_out_spoils_no_checkpoint(ranks: RankPool, tmp_path: Path, distributed: bool) -> None:
    """Every checkpoint since holds the moments: a run goes on from one with the undisturbed run's losses."""
    recipe = guarded(tmp_path, optimizer={"distributed": distributed})
    assert ranks.run(1, run, recipe, poison_the_first) == ["ended well"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    for step in (5, 6):
        shutil.rmtree(tmp_path / "run" / f"step_{step:07d}")
    (tmp_path / "run" / "latest").write_text("step_0000004")
    assert ranks.run(1, run, recipe, None) == ["ended well"]
    assert [json.loads(line)["loss"] for line in metrics.read_text().splitlines()] == before
