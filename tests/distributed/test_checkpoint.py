"""Checkpoints between layouts: saved at tp2 x pp2, continued anywhere with the next losses and the recipe's rates."""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.writing import start_server
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import CheckpointError
from megatron_vlm.training import schedule
from megatron_vlm.training.job import build_job
from tests.helpers.faults.spoiling import as_format
from tests.helpers.models.recipes import base_recipe, merged
from tests.helpers.ranks.jobs import save, train_steps
from tests.helpers.ranks.pool import RankPool

BEFORE, AFTER = 3, 3
LAYOUTS = {
    "one-process": (1, {}),
    "dp2": (2, {}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-virtual2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}
SLOW = ("dp2", "tp2-sp", "pp2-virtual2")


def train_and_save(recipe: dict[str, Any]) -> list[float]:
    """Some steps, a save, and the undisturbed continuation's losses."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    train_steps(job, BEFORE)
    save(job, BEFORE)
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
        base_recipe(directory),
        {"checkpoint": {"directory": str(directory / "run")}, "training": {"steps": BEFORE + AFTER}},
    )
    four = merged(recipe, {"parallel": {"tensor": 2, "pipeline": 2}})
    losses = ranks.run(4, train_and_save, four)
    assert all(rank_losses == losses[0] for rank_losses in losses)
    return recipe, losses[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_any_layout_continues(ranks: RankPool, saved: Any, name: str) -> None:
    recipe, undisturbed = saved
    num_ranks, parallel = LAYOUTS[name]
    new_rate = {  # a rate changed in the recipe holds from the next step on
        "optimizer": {"lr_vision": 5e-4},
        "checkpoint": {"accept_changes": ["optimizer.lr_vision"]},
    }
    recipe = merged(recipe, {"checkpoint": {"load": recipe["checkpoint"]["directory"]}, "parallel": parallel})
    for start_step, losses, groups in ranks.run(num_ranks, load_and_train, recipe):
        assert start_step == BEFORE
        assert losses == pytest.approx(undisturbed, rel=1e-5)
        check_groups(groups, Config.model_validate(recipe))
    for _, losses, groups in ranks.run(num_ranks, load_and_train, merged(recipe, new_rate)):
        assert losses[0] == pytest.approx(undisturbed[0], rel=1e-5)
        assert losses[-1] != pytest.approx(undisturbed[-1], rel=1e-5), "the new rate changed nothing"
        check_groups(groups, Config.model_validate(merged(recipe, new_rate)))


def test_states_cut_over_data_parallel_ranks_continue_anywhere(ranks: RankPool, tmp_path: Path) -> None:
    """Saved by three ranks that hold a third each of the optimizer's states, cut through rows and tensors."""
    changes = {
        "checkpoint": {"directory": str(tmp_path / "run")},
        "training": {"steps": BEFORE + AFTER, "global_batch_size": 6},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    }
    recipe = merged(base_recipe(tmp_path), changes)
    undisturbed = ranks.run(3, train_and_save, recipe)[0]
    alone = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    for num_ranks, parallel in ((1, alone), (2, alone | {"tensor": 2}), (2, {})):
        other = merged(recipe, {"checkpoint": {"load": str(tmp_path / "run")}, "parallel": parallel})
        for start_step, losses, _ in ranks.run(num_ranks, load_and_train, other):
            assert start_step == BEFORE and losses == pytest.approx(undisturbed, rel=1e-5)


def check_groups(groups: list[tuple[str, float, float, int]], config: Config) -> None:
    """Every component has a decayed and an undecayed group, at the recipe's rates for the last step."""
    last, steps = BEFORE + AFTER - 1, config.training.steps
    for component, peak in schedule.peak_rates(config.optimizer).items():
        rate = schedule.learning_rate(last, steps, peak, config.schedule)
        found = sorted((lr, decay) for name, lr, decay, _ in groups if name == component)
        assert found == [(rate, 0.0), (rate, config.optimizer.weight_decay)], component
    assert {step for *_, step in groups} == {BEFORE + AFTER}


def test_only_the_weights_for_a_new_phase(ranks: RankPool, saved: Any, tmp_path: Path) -> None:
    recipe, undisturbed = saved
    load = {"load": recipe["checkpoint"]["directory"], "load_states": "model", "directory": str(tmp_path)}
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
    load = {"load": recipe["checkpoint"]["directory"], "accept_changes": ["model.train"]}
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
            as_format(manifest, 1)
    with pytest.raises(CheckpointError, match=str(copy)):
        find_checkpoint(copy)


def test_a_killed_replacement_leaves_a_checkpoint(ranks: RankPool, saved: Any, tmp_path: Path) -> None:
    """A save of a step that is there already, killed between its two renames, then done again, and once more."""
    root = tmp_path / "run"
    shutil.copytree(saved[0]["checkpoint"]["directory"], root)
    final = find_checkpoint(root)
    replaced = root / f".replaced_{final.name}"
    final.rename(replaced)
    assert find_checkpoint(root) == replaced
    shutil.copytree(replaced, final)  # now as if killed after the second rename
    recipe = merged(saved[0], {"checkpoint": {"directory": str(root), "load": str(root)}})
    ranks.run(1, train_and_save, recipe)
    assert find_checkpoint(root) == final and not replaced.exists()


CHANGES = {
    "fewer layers": {"language": {"config": {"num_hidden_layers": 2}}},
    "tied head": {"language": {"config": {"tie_word_embeddings": True}}},
    "shallower projector": {"projector": {"type": "mlp1x_gelu"}},
    "larger vocabulary": {"language": {"config": {"vocab_size": 400}}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_refused(ranks: RankPool, saved: Any, tmp_path: Path, change: str) -> None:
    load = {"load": saved[0]["checkpoint"]["directory"], "load_states": "model", "directory": str(tmp_path)}
    (message,) = ranks.run(1, refusal, merged(saved[0], {"checkpoint": load, "model": CHANGES[change]}))
    assert "only in the checkpoint" in message or "a vocabulary of" in message, message


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"train": {"vision": False}}},
        {"model": {"freeze": ["layers.3"]}},
        {"optimizer": {"distributed": False}},
    ],
    ids=["tower frozen", "a layer frozen", "states not sharded"],
)
def test_other_optimizer_states_are_refused(ranks: RankPool, saved: Any, sections: Any) -> None:
    load = {"load": saved[0]["checkpoint"]["directory"], "accept_changes": ["model", "optimizer.distributed"]}
    recipe = merged(saved[0], {"checkpoint": load} | sections)
    (message,) = ranks.run(1, refusal, recipe)
    assert "checkpoint.load_states" in message, message


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_file_is_one_error(ranks: RankPool, saved: Any, tmp_path: Path, name: str, how: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(find_checkpoint(saved[0]["checkpoint"]["directory"]), copy)
    if how == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes((copy / name).read_bytes()[:20])
    (message,) = ranks.run(
        1, refusal, merged(saved[0], {"checkpoint": {"load": str(copy), "directory": str(tmp_path)}})
    )
    assert str(copy) in message and "\n" not in message


def refusal(recipe: dict[str, Any]) -> str:
    """The message of the CheckpointError that building the job raises."""
    with pytest.raises(CheckpointError) as caught:
        build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    return str(caught.value)


@pytest.mark.parametrize(
    "async_save", [pytest.param(False, marks=pytest.mark.slow), True], ids=["of the file", "of the snapshot"]
)
def test_a_limit_met_on_any_rank_leaves_what_was_published(
    ranks: RankPool, saved: Any, tmp_path: Path, async_save: bool
) -> None:
    root = tmp_path / "run"
    shutil.copytree(saved[0]["checkpoint"]["directory"], root)
    checkpoint = {"directory": str(root), "load": str(root), "async_save": async_save}
    recipe = merged(saved[0], {"checkpoint": checkpoint, "parallel": {"tensor": 2}})
    first, second = ranks.run(2, save_on_a_full_disk, recipe)
    assert first == second and first.endswith("[Errno 27] File too large (rank 1)"), first
    assert not list(root.glob(".partial*"))
    assert find_checkpoint(root).name == f"step_{BEFORE:07d}"


def save_on_a_full_disk(recipe: dict[str, Any]) -> str:
    """Rank 1 may write no file above 20 kB. Returns the error's message."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    train_steps(job, 1)
    start_server()  # before there is a limit, which it would pass on to the writers of other tests
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if job.grid.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(job, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value)


def test_some_layers_frozen(ranks: RankPool, tmp_path: Path) -> None:
    """A whole stage without anything to train is saved, and continued without stages."""
    freeze = ["layers.[23]", "language.output_layer", "final_layernorm"]
    changes = {"checkpoint": {"directory": str(tmp_path / "run")}, "training": {"steps": BEFORE + AFTER}}
    recipe = merged(base_recipe(tmp_path), {**changes, "model": {"freeze": freeze}})
    undisturbed = ranks.run(2, train_and_save, merged(recipe, {"parallel": {"pipeline": 2}}), timeout=60)[0]
    load = {"load": str(tmp_path / "run")}
    (_, losses, _) = ranks.run(1, load_and_train, merged(recipe, {"checkpoint": load}))[0]
    assert losses == pytest.approx(undisturbed, rel=1e-5)


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bf16_continues_from_fp32_master_weights(ranks: RankPool, tmp_path: Path, distributed: bool) -> None:
    """All states: the next losses. Weights alone: the masters are the loaded weights, not the random ones."""
    changes = {
        "checkpoint": {"directory": str(tmp_path / "run")},
        "training": {"steps": BEFORE + AFTER},
        "precision": {"params": "bf16"},
        "optimizer": {"distributed": distributed},
    }
    recipe = merged(base_recipe(tmp_path), changes)
    undisturbed = ranks.run(1, train_and_save, recipe)[0]
    resumed = merged(recipe, {"checkpoint": {"load": str(tmp_path / "run")}})
    assert ranks.run(1, load_and_train, resumed)[0][1] == pytest.approx(undisturbed, rel=1e-6)
    still = {"lr": 0.0, "lr_projector": 0.0, "lr_vision": 0.0}
    weights_alone = merged(
        resumed, {"checkpoint": {"load_states": "model", "directory": str(tmp_path / "new")}, "optimizer": still}
    )
    losses = ranks.run(1, load_and_train, weights_alone)[0][1]
    assert max(losses) < 5.6, f"{losses}: an update put random weights back, whose loss is 5.8"
