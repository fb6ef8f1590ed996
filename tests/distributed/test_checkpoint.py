"""Checkpoints between layouts: saved at tp2 x pp2, continued anywhere with the next losses and the recipe's rates."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.store import find_checkpoint, save_checkpoint
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import CheckpointError
from megatron_vlm.training import schedule
from megatron_vlm.training.job import build_job
from tests.distributed.test_master import base_recipe, merged
from tests.helpers.master import train_steps
from tests.helpers.ranks import RankPool

BEFORE, AFTER = 3, 3
LAYOUTS = {
    "one-process": (1, {}),
    "dp2": (2, {}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-virtual2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}


def train_and_save(recipe: dict[str, Any]) -> list[float]:
    """Some steps, a save, and the undisturbed continuation's losses."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    train_steps(job, BEFORE)
    save_checkpoint(job.state(BEFORE))
    job.start_step = BEFORE
    return train_steps(job, AFTER)[0]


def load_and_train(recipe: dict[str, Any]) -> tuple[int, list[float], list[tuple[str, float, float, int]]]:
    """Resumes: the step found, the next losses, and (component, rate, decay, optimizer step) of every group."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    losses, _ = train_steps(job, AFTER)
    groups = [
        (group["component"], group["lr"], group["weight_decay"], group["step"]) for group in job.optimizer.param_groups
    ]
    return job.start_step, losses, groups


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[float]]:
    directory = tmp_path_factory.mktemp("checkpoint")
    recipe = merged(
        base_recipe(directory, {}),
        {"checkpoint": {"directory": str(directory / "run")}, "training": {"steps": BEFORE + AFTER}},
    )
    four = merged(recipe, {"parallel": {"tensor": 2, "pipeline": 2}})
    losses = ranks.run(4, train_and_save, four)
    assert all(rank_losses == losses[0] for rank_losses in losses)
    return recipe, losses[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_continues(ranks: RankPool, saved: Any, name: str) -> None:
    recipe, undisturbed = saved
    num_ranks, parallel = LAYOUTS[name]
    new_rate = {"optimizer": {"lr_vision": 5e-4}}  # a rate changed in the recipe holds from the next step on
    recipe = merged(recipe, {"checkpoint": {"load": recipe["checkpoint"]["directory"]}, "parallel": parallel})
    for start_step, losses, groups in ranks.run(num_ranks, load_and_train, recipe):
        assert start_step == BEFORE
        assert losses == pytest.approx(undisturbed, rel=1e-5)
        check_groups(groups, Config.model_validate(recipe))
    for _, losses, groups in ranks.run(num_ranks, load_and_train, merged(recipe, new_rate)):
        assert losses[0] == pytest.approx(undisturbed[0], rel=1e-5)
        assert losses[-1] != pytest.approx(undisturbed[-1], rel=1e-5), "the new rate changed nothing"
        check_groups(groups, Config.model_validate(merged(recipe, new_rate)))


def check_groups(groups: list[tuple[str, float, float, int]], config: Config) -> None:
    """Every component has a decayed and an undecayed group, at the recipe's rates for the last step."""
    last, steps = BEFORE + AFTER - 1, config.training.steps
    for component, peak in schedule.peak_rates(config.optimizer).items():
        rate = schedule.learning_rate(last, steps, peak, config.schedule)
        found = sorted((lr, decay) for name, lr, decay, _ in groups if name == component)
        assert found == [(rate, 0.0), (rate, config.optimizer.weight_decay)], component
    assert {step for *_, step in groups} == {BEFORE + AFTER}


def test_only_the_weights_for_a_new_phase(ranks: RankPool, saved: Any) -> None:
    recipe, undisturbed = saved
    load = {"load": recipe["checkpoint"]["directory"], "load_states": "model"}
    frozen = {"train": {"language": False, "vision": False, "projector": True}}
    recipe = merged(recipe, {"checkpoint": load, "model": frozen})
    start_step, losses, groups = ranks.run(1, load_and_train, recipe)[0]
    assert start_step == 0
    assert {component for component, *_ in groups} == {"projector"}
    assert losses[0] != pytest.approx(undisturbed[0], rel=1e-5)


def test_the_directory_is_whole(saved: Any) -> None:
    recipe, _ = saved
    root = Path(recipe["checkpoint"]["directory"])
    checkpoint = find_checkpoint(root)
    assert checkpoint.name == f"step_{BEFORE:07d}" and not list(root.glob(".partial*"))
    manifest = Manifest.read(checkpoint)
    assert manifest.step == BEFORE and manifest.config["training"] == recipe["training"]
    for name in ("tokenizer/tokenizer.json", "language/config.json", "vision/config.json"):
        assert (checkpoint / name).is_file(), name


def test_other_trainable_components_are_refused(ranks: RankPool, saved: Any) -> None:
    recipe, _ = saved
    frozen = {"train": {"language": False, "vision": False, "projector": True}}
    load = {"load": recipe["checkpoint"]["directory"]}
    with pytest.raises(Exception, match="set checkpoint.load_states to model"):
        ranks.run(1, load_and_train, merged(recipe, {"checkpoint": load, "model": frozen}))


@pytest.mark.parametrize("damage", ["missing", "no manifest", "half a manifest", "other format"])
def test_what_is_no_checkpoint_is_named(saved: Any, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(find_checkpoint(saved[0]["checkpoint"]["directory"]), copy)
    manifest = copy / "manifest.json"
    match damage:
        case "missing":
            shutil.rmtree(copy)
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:100])
        case "other format":
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match=str(copy)):
        find_checkpoint(copy)
