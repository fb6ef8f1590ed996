"""Encoding shared out over the world gives the losses, gradients and updates of one process (the master test's terms).

Costs are all equal in these recipes, so replicas with few images encode for the others; the batches have replicas
with none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.training import step
from megatron_vlm.training.layout_check.compare import compare
from megatron_vlm.training.layout_check.record import Record
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.master import run_layout
from tests.helpers.ranks.pool import RankFailure, RankPool

STEPS = 3
FAST = {
    "dp2": (2, {}),
    "dp2-tp2-sp": (4, {"parallel": {"tensor": 2, "sequence": True}}),
}
SLOW = {
    "dp4-windows": (4, {"training": {"media_window": 1}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "dp2-pp2": (4, {"parallel": {"pipeline": 2}}),
    "dp2-tp2-pp2": (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "dp2-recompute": (2, {"training": {"recompute": {"vision": "full"}}}),
    "dp2-given-cost": (2, {"model": {"vision": {"cost": {"linear": 1.0, "quadratic": 0.5}}}}),
}


def recipe(directory: Path, **sections: Any) -> dict[str, Any]:
    sections["optimizer"] = {"lr": 1e-3, "lr_vision": 2e-3, "distributed": True}
    return tiny_recipe(directory, **sections).model_dump(mode="json")


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    directory = tmp_path_factory.mktemp("world")
    return directory, ranks.run(1, run_layout, recipe(directory), STEPS)[0]


def run_lopsided(tree: dict[str, Any], steps: int) -> Record:
    """A fault: gradients go back over the replica's route, as if no replica had worked for another."""
    original = step.return_gradients

    def keep_own(grads: torch.Tensor, *rest: Any) -> torch.Tensor:
        returned = original(grads, *rest)
        return torch.zeros_like(returned) if torch.distributed.get_rank() else returned

    step.return_gradients = keep_own
    try:
        return run_layout(tree, steps)
    finally:
        step.return_gradients = original


def check(
    ranks: RankPool, one: tuple[Path, Record], layout: tuple[int, dict[str, Any]], body: Any = run_layout
) -> None:
    directory, reference = one
    num_ranks, sections = layout
    sections = sections | {"parallel": {"media_group": "world", **sections.get("parallel", {})}}
    tree = recipe(directory, **sections)
    comparisons = compare(reference, ranks.run(num_ranks, body, tree, STEPS), Config.model_validate(tree))
    wrong = [str(found) for comparison in comparisons for found in comparison.differences if not found.holds]
    assert len(comparisons) > 8 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", FAST)
def test_layout(ranks: RankPool, one: tuple[Path, Record], name: str) -> None:
    check(ranks, one, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_layout_slow(ranks: RankPool, one: tuple[Path, Record], name: str) -> None:
    check(ranks, one, SLOW[name])


def test_gradients_that_do_not_come_back_are_noticed(ranks: RankPool, one: tuple[Path, Record]) -> None:
    with pytest.raises(AssertionError, match="gradient of (vision|projector).* is off by") as caught:
        check(ranks, one, FAST["dp2"], run_lopsided)
    assert not isinstance(caught.value, RankFailure)
