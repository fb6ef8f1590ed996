"""Projectors that are more than linear layers, trained in parallel: as one process trains them (tests of the master's
kind, shorter), and with fewer rows than the tower has tokens, as the data side counts them."""

from typing import Any

import pytest

from megatron_vlm.config.schema import Config
from megatron_vlm.training.layout_check.compare import compare
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.master import run_layout
from tests.helpers.ranks.pool import RankPool

STEPS = 2
LAYOUT = {"tensor": 2, "sequence": True}


def recipe(directory: Any, projector: str, **sections: Any) -> dict[str, Any]:
    model = {"projector": {"type": projector}}
    return tiny_recipe(directory, model=model, training={"steps": STEPS}, **sections).model_dump(mode="json")


@pytest.mark.parametrize(
    "projector",
    ["mlp_downsample", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp_downsample_3x3_fix", "cluster"))],
)
def test_trains_in_parallel_as_in_one_process(ranks: RankPool, tmp_path: Any, projector: str) -> None:
    (one,) = ranks.run(1, run_layout, recipe(tmp_path, projector), STEPS)
    parallel = recipe(tmp_path, projector, parallel=LAYOUT)
    comparisons = compare(one, ranks.run(2, run_layout, parallel, STEPS), Config.model_validate(parallel))
    differences = [found for comparison in comparisons for found in comparison.differences]
    assert len(one.losses) == STEPS and len(differences) > 10
    wrong = [str(found) for found in differences if not found.holds]
    assert not wrong, "\n".join(wrong)


def test_the_order_of_the_rows_reaches_the_loss(ranks: RankPool, tmp_path: Any) -> None:
    """The planted fault: weights of one order run with the other's. The weights are the same: names and seed are."""
    losses = [
        ranks.run(1, run_layout, recipe(tmp_path, projector), 1)[0].losses[0]
        for projector in ("mlp_downsample", "mlp_downsample_2x2_fix")
    ]
    assert abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0])
