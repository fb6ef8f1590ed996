"""The recipe's `loss` section in a whole job: what trains, what is logged and what is held out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models.held_out import recipe_in
from tests.helpers.ranks.pool import RankPool

DIGITS = {"format": "{t}", "count": 10, "std": 2.0}  # a byte-level tokenizer has them, one after the other
LOSS = {"z_loss": 0.01, "label_smoothing": 0.1, "time_tokens": DIGITS}


def run(recipe: dict[str, Any]) -> dict[str, Any]:
    """The held-out loss before training, then losses and gradient norms of two steps, and what the head was told."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.training.held_out import build_held_out
    from megatron_vlm.training.job import build_job
    from tests.helpers.ranks.jobs import train_steps

    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    held_out = build_held_out(job)
    assert held_out is not None
    report = held_out.evaluate(0)
    assert report is not None
    losses, norms = train_steps(job, 2)
    last = job.model.language[-1]
    rules = last.output_layer.training_rules if last.post_process else None
    ids = [job.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    return {"held_out": report.loss, "losses": losses, "norms": norms, "rules": rules, "digits": ids}


def recipe(directory: Path, loss: dict[str, Any], **parallel: Any) -> dict[str, Any]:
    return recipe_in(directory, loss=loss, parallel=parallel, evaluation={"task": None})


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process with everything on."""
    return ranks.run(1, run, recipe(tmp_path_factory.mktemp("alone"), LOSS))[0]


def test_the_rules_train_and_are_logged_but_are_not_held_out(
    ranks: RankPool, alone: dict[str, Any], tmp_path: Path
) -> None:
    from megatron_vlm.ops.reference import SoftTargets

    plain = ranks.run(1, run, recipe(tmp_path, {}))[0]
    assert plain["rules"] == {"z_loss": 0.0, "label_smoothing": 0.0}
    assert alone["rules"] == {
        "z_loss": 0.01,
        "label_smoothing": 0.1,
        "soft_targets": SoftTargets(alone["digits"][0], 10, 2.0),
    }
    assert alone["held_out"] == plain["held_out"]
    assert alone["losses"][0] > plain["losses"][0] + 0.1  # z-loss alone: 0.01 * log(vocabulary)^2 = 0.3
    assert alone["norms"][0] != pytest.approx(plain["norms"][0], rel=1e-3)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"tensor": 2, "sequence": True}),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"ring": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_learns_the_same(
    ranks: RankPool, alone: dict[str, Any], tmp_path: Path, num_ranks: int, parallel: dict[str, Any]
) -> None:
    for outcome in ranks.run(num_ranks, run, recipe(tmp_path, LOSS, **parallel)):
        for key in ("held_out", "losses", "norms"):
            assert outcome[key] == pytest.approx(alone[key], rel=1e-5)


def message_of_a_refused_job(recipe: dict[str, Any]) -> str:
    from megatron_vlm.config.schema import Config
    from megatron_vlm.errors import ConfigError
    from megatron_vlm.training.job import build_job

    with pytest.raises(ConfigError) as caught:
        build_job(Config.model_validate(recipe), 1)
    return str(caught.value)


def test_time_tokens_that_the_tokenizer_lacks_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    message = ranks.run(1, message_of_a_refused_job, recipe(tmp_path, {"time_tokens": {"count": 100}}))[0]
    assert message.startswith("loss.time_tokens: found 100 tokens '<t0>' to '<t99>', of which the tokenizer lacks 100")
