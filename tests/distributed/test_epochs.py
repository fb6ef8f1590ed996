"""`training.epochs`: the run is the one of as many steps, goes on as that one does, and what gives no step is told."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from megatron_vlm.checkpoint.directory import checkpoints
from megatron_vlm.config.schema import Config
from megatron_vlm.training.schedule import learning_rate
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.helpers.ranks.live_jobs import read_metrics, train_in_pool
from tests.helpers.ranks.pool import RankFailure, RankPool

NUM_SAMPLES, BATCH = 24, 8


def a_recipe(tmp_path: Path, name: str, length: dict[str, Any], **sections: Any) -> dict[str, Any]:
    recipe = tiny_recipe(
        tmp_path,
        training={"steps": None, "global_batch_size": BATCH, **length, **sections.pop("training", {})},
        schedule={"warmup_ratio": 0.5},
        checkpoint={"directory": str(tmp_path / name), **sections.pop("checkpoint", {})},
        logging={"tensorboard": False, "ranks_every_steps": 0},
        **sections,
    )
    return recipe.model_dump(mode="json")


def test_epochs_are_as_many_steps(ranks: RankPool, tmp_path: Path) -> None:
    """1.4 epochs of 24 samples are 4 whole batches of 8; the warm-up is half of these."""
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "steps", {"steps": 4}))
    by_epochs = a_recipe(tmp_path, "epochs", {"epochs": 1.4})
    ranks.run(2, train_in_pool, by_epochs)
    steps, epochs = read_metrics(tmp_path / "steps"), read_metrics(tmp_path / "epochs")
    assert [line["loss"] for line in epochs] == [line["loss"] for line in steps] and len(epochs) == 4
    config = Config.model_validate(by_epochs)
    rates = [learning_rate(step, 4, config.optimizer.lr, config.schedule) for step in range(4)]
    assert [line["learning_rates"]["language"] for line in epochs] == rates and rates[2] == max(rates)
    written = yaml.safe_load((tmp_path / "epochs" / "recipe.yaml").read_text())["training"]
    assert (written["steps"], written["epochs"]) == (math.floor(1.4 * NUM_SAMPLES / BATCH), None)

    before = checkpoints(tmp_path / "epochs")
    ranks.run(2, train_in_pool, by_epochs)  # is done
    assert checkpoints(tmp_path / "epochs") == before
    longer = {"epochs": 2.0}
    with pytest.raises(RankFailure, match=r"training\.steps: found 6, it was trained with 4; .*accept_changes"):
        ranks.run(2, train_in_pool, a_recipe(tmp_path, "epochs", longer))
    accepted = {"accept_changes": ["training.epochs"]}
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "epochs", longer, checkpoint=accepted))
    assert [line["step"] for line in read_metrics(tmp_path / "epochs")] == [1, 2, 3, 4, 5, 6]

    held_out = {"path": str(tiny_dataset(tmp_path, 5, "held_out.json"))}
    gone = {"data": {"path": str(tmp_path / "gone.json")}}  # what is evaluated needs no training data to be counted
    recipe = a_recipe(tmp_path, "epochs", longer, training={"mode": "eval"}, evaluation=held_out, **gone)
    ranks.run(1, train_in_pool, recipe)
    assert '"step": 6' in (tmp_path / "epochs" / "evaluation.jsonl").read_text()


def count_openings(recipe: dict[str, Any]) -> tuple[int, int]:
    """Inside a rank: how often a run opens its training data, and how often it plans them."""
    from megatron_vlm.data.fetch import loader

    with (
        mock.patch.object(loader, "open_samples", wraps=loader.open_samples) as opens,
        mock.patch.object(loader, "make_plan", wraps=loader.make_plan) as plans,
    ):
        train_in_pool(recipe)
    return opens.call_count, plans.call_count


def test_data_are_opened_once(ranks: RankPool, tmp_path: Path) -> None:
    """Those that are counted are those that are trained; prepared by the pixels that the run settles on later."""
    assert ranks.run(1, count_openings, a_recipe(tmp_path, "epochs", {"epochs": 0.4})) == [(1, 1)]


@pytest.mark.parametrize(
    ("epochs", "samples", "message"),
    [
        (0.3, None, r"training\.epochs: found 0\.3, which is no step: an epoch of .*train\.json has 24 samples, and a"),
        (5.0, "[]", r"holds no conversation"),
    ],
)
def test_what_gives_no_step_is_told(
    ranks: RankPool, tmp_path: Path, epochs: float, samples: str | None, message: str
) -> None:
    recipe = a_recipe(tmp_path, "run", {"epochs": epochs})
    if samples is not None:
        Path(recipe["data"]["path"]).write_text(samples)
    with pytest.raises(RankFailure, match=message):
        ranks.run(1, train_in_pool, recipe)
