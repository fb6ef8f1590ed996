"""FP8 learns as fp32 does: the quickstart's first phase on its digits, from random weights, on one rank.

The mean loss over the steps is within 2% of fp32's, with activations as they are and a thousand times as large. With
every scale 1 and activations a thousand times as large, it is not: the scales are what makes the difference.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from examples.quickstart.make_data import make_data
from megatron_vlm.config import load_config
from megatron_vlm.config.schema import Config
from megatron_vlm.ops import reference_fp8
from megatron_vlm.ops.fp8 import fp8_linear
from megatron_vlm.training.job import build_job
from tests.architecture.sources import ROOT
from tests.helpers.ranks.jobs import train_steps
from tests.helpers.ranks.pool import RankPool

STEPS, FEW_STEPS = 200, 25
ALLOWED = 0.02
FACTOR = 1000.0
SECONDS = 1800.0  # for a run of 200 steps, on a busy machine


@contextlib.contextmanager
def changed(change: str | None) -> Iterator[None]:
    """`large`: every FP8 layer's input is a thousand times as large, and its result divided again. `scales of 1`: that,
    and no number is divided by a scale."""

    def large(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return fp8_linear(x * FACTOR, weight, **options) / FACTOR

    with contextlib.ExitStack() as stack:
        if change is not None:
            stack.enter_context(mock.patch("megatron_vlm.models.fp8.fp8_linear", large))
        if change == "scales of 1":
            stack.enter_context(mock.patch.object(reference_fp8, "fp8_scale", lambda amax, dtype: torch.ones(1)))
        yield


def learn(recipe: dict[str, Any], steps: int, change: str | None) -> list[float]:
    """The losses of the first steps."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    with changed(change):
        return train_steps(job, steps)[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("digits")
    make_data(directory)
    overrides = [
        f"data.path={directory / 'train.json'}",
        f"model.language.tokenizer={directory / 'tokenizer'}",
        f"checkpoint.directory={directory / 'run'}",
        "checkpoint.load=null",
        "checkpoint.load_states=all",
        "data.num_workers=0",
        "parallel.tensor=1",
        "parallel.pipeline=1",
        "parallel.sequence=false",
    ]
    return load_config(ROOT / "examples/recipes/quickstart_phase1.yaml", overrides).model_dump(mode="json")


def mean_loss(
    ranks: RankPool, recipe: dict[str, Any], steps: int, change: str | None = None, **precision: str
) -> float:
    recipe = {**recipe, "precision": {**recipe["precision"], **precision}}
    (losses,) = ranks.run(1, learn, recipe, steps, change, timeout=SECONDS)
    assert len(losses) == steps
    return sum(losses) / steps


def assert_near(found: float, expected: float) -> None:
    assert abs(found / expected - 1) <= ALLOWED, f"mean loss {found:.4f}, in fp32 {expected:.4f}"


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.slow
@pytest.mark.parametrize("steps", [FEW_STEPS, STEPS])
def test_fp8_learns_as_fp32_does(ranks: RankPool, recipe: dict[str, Any], steps: int) -> None:
    expected = mean_loss(ranks, recipe, steps)
    found = mean_loss(ranks, recipe, steps, fp8="tensorwise")
    assert found != expected, "nothing was quantised"
    assert_near(found, expected)
    with pytest.raises(AssertionError, match="in fp32"):
        assert_near(mean_loss(ranks, recipe, steps, "scales of 1", fp8="tensorwise"), expected)
    if steps == STEPS:
        assert_near(mean_loss(ranks, recipe, steps, "large", fp8="tensorwise"), expected)
