"""The step and the loop out of the ordinary: a gradient that is not finite, a rate of zero, nothing left to do."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.planner.peak import Peak
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.training.hooks import showing_hooks
from megatron_vlm.training.job import build_job
from megatron_vlm.training.loop import train
from megatron_vlm.training.step import EncodedMedia
from tests.helpers.models.recipes import base_recipe, merged
from tests.helpers.ranks.jobs import train_steps
from tests.helpers.ranks.master import trained
from tests.helpers.ranks.pool import RankPool


def step_with_a_bad_gradient(recipe: dict[str, Any]) -> tuple[float, bool]:
    """The last rank's projector gets a NaN. Returns the norm reported and whether anything changed."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    train_steps(job, 1)
    before = {name: parameter.detach().clone() for name, parameter in trained(job)}
    finish = job.vision.finish_grad_sync

    def poison() -> None:
        if job.grid.rank == job.grid.sizes.world - 1:
            next(job.vision.module.projector.parameters()).main_grad.fill_(float("nan"))
        finish()

    job.vision.finish_grad_sync = poison
    job.start_step = 1
    _, norms = train_steps(job, 1)
    return norms[0], any(not torch.equal(parameter, before[name]) for name, parameter in trained(job))


@pytest.mark.parametrize("params", ["fp32", "bf16"])
def test_an_infinite_gradient_changes_nothing_on_any_rank(ranks: RankPool, tmp_path: Path, params: str) -> None:
    recipe = merged(base_recipe(tmp_path), {"precision": {"params": params}})
    for norm, changed in ranks.run(2, step_with_a_bad_gradient, recipe):
        assert norm != norm and not changed


def changes_per_component(recipe: dict[str, Any]) -> dict[str, float]:
    """By how much one step moves each component."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    before = {name: parameter.detach().clone() for name, parameter in trained(job)}
    train_steps(job, 1)
    moved: dict[str, float] = {}
    for name, parameter in trained(job):
        change: Tensor = (parameter.detach() - before[name]).abs().max()
        moved[name.partition(".")[0]] = max(moved.get(name.partition(".")[0], 0.0), float(change))
    return moved


@pytest.mark.parametrize("still", ["language", "projector", "vision"])
def test_each_component_has_its_own_rate(ranks: RankPool, tmp_path: Path, still: str) -> None:
    rates = {"lr": 1e-3, "lr_projector": 1e-3, "lr_vision": 1e-3}
    rates["lr" if still == "language" else f"lr_{still}"] = 0.0
    moved = ranks.run(1, changes_per_component, merged(base_recipe(tmp_path), {"optimizer": rates}))[0]
    assert {component for component, change in moved.items() if change == 0.0} == {still}


def run_to_the_end(recipe: dict[str, Any]) -> str:
    return str(train(Config.model_validate(recipe), Launch()))


def test_a_finished_run_has_nothing_to_do(ranks: RankPool, tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    recipe = merged(base_recipe(tmp_path), {"checkpoint": {"directory": directory}, "training": {"steps": 2}})
    (first,) = ranks.run(1, run_to_the_end, recipe)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    for steps in (2, 1):
        shorter = {"training": {"steps": steps}, "checkpoint": {"accept_changes": ["training.steps"]}}
        again = merged(recipe, shorter)
        assert ranks.run(1, run_to_the_end, again) == [first]
    assert metrics.startswith((tmp_path / "run" / "metrics.jsonl").read_text())


def test_an_unwritable_directory_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = merged(base_recipe(tmp_path), {"checkpoint": {"directory": str(tmp_path / "file" / "run")}})
    with pytest.raises(ConfigError, match="checkpoint.directory: found"):
        showing_hooks(Config.model_validate(recipe), 0, Peak(1.0, "none"), {})


def losses_of(recipe: dict[str, Any]) -> list[float]:
    return train_steps(build_job(Config.model_validate(recipe), torch.distributed.get_world_size()), 3)[0]


def test_backends_and_chunks_change_nothing(ranks: RankPool, tmp_path: Path) -> None:
    recipe = base_recipe(tmp_path)
    wanted = ranks.run(1, losses_of, recipe)[0]
    for ops in ({"attention": "reference"}, {"attention": "cpu"}, {"loss_chunk_tokens": 7}):
        assert ranks.run(1, losses_of, merged(recipe, {"ops": ops}))[0] == pytest.approx(wanted, rel=1e-5), ops


def losses_of_split(recipe: dict[str, Any]) -> tuple[list[float], ParallelConfig]:
    """Losses, and how the recipe that a checkpoint keeps cuts the ranks."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size(), ranks_per_node=2)
    return train_steps(job, 2)[0], job.state(2).config.parallel


def test_context_ranks_are_split_and_the_split_is_kept(ranks: RankPool, tmp_path: Path) -> None:
    """Four ranks of two machines: the losses of one process."""
    recipe = base_recipe(tmp_path)
    wanted = ranks.run(1, losses_of, recipe)[0][:2]
    losses, parallel = ranks.run(4, losses_of_split, merged(recipe, {"parallel": {"context": 4}}))[0]
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert (parallel.context, parallel.ulysses, parallel.ring) == (None, 2, 2)


def test_gradients_are_clipped_as_asked(ranks: RankPool, tmp_path: Path) -> None:
    """Adam hardly feels a scale, but for gradients as small as its eps."""
    recipe = base_recipe(tmp_path)
    off, far_off, hard = (
        ranks.run(1, losses_of, merged(recipe, {"optimizer": {"clip_norm": norm}}))[0] for norm in (0.0, 1e9, 1e-9)
    )
    assert off == far_off
    assert hard[0] == off[0] and hard[2] > off[2] + 0.01


def features_still_held(recipe: dict[str, Any]) -> tuple[list[int], int]:
    """Rows of earlier windows, encoded and received, that live when a window is encoded: one training step's windows,
    then one evaluation's. And how many were watched."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    encode = job.step._encode
    watched: list[weakref.ref[Tensor]] = []
    held = []

    def watch(*arguments: Any) -> EncodedMedia:
        media = encode(*arguments)
        held.append(sum(ref() is not None for ref in watched))
        watched.extend(weakref.ref(rows) for rows in (*media.encoded, *(local.rows for local in media.features)))
        return media

    job.step._encode = watch
    (batch,) = job.batches(1)
    job.step(batch)
    job.step.evaluate(batch)
    return held, len(watched)


def test_a_window_holds_no_other_windows_features(ranks: RankPool, tmp_path: Path) -> None:
    recipe = merged(base_recipe(tmp_path), {"training": {"media_window": 2}})
    held, num_watched = ranks.run(1, features_still_held, recipe)[0]
    assert len(held) >= 4 and num_watched == 3 * len(held), "windows of two micro-batches, in training and evaluation"
    assert not any(held)
