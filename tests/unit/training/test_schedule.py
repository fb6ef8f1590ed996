"""The learning-rate schedules against transformers' at every step, and rates per component."""

import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from megatron_vlm.config.schema import OptimizerConfig, ScheduleConfig
from megatron_vlm.training import schedule

PEAK = 3e-4
THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: get_constant_schedule_with_warmup(optimizer, warmup),
}


def their_rates(name: str, warmup: int, steps: int) -> list[float]:
    """Their rate at each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = THEIRS[name](optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    return rates


def our_rates(name: str, warmup_ratio: float, steps: int, min_lr: float = 0.0) -> list[float]:
    settings = ScheduleConfig(name=name, warmup_ratio=warmup_ratio, min_lr=min_lr)
    return [schedule.learning_rate(step, steps, PEAK, settings) for step in range(steps)]


@pytest.mark.parametrize("name", sorted(THEIRS))
@pytest.mark.parametrize(("steps", "warmup_ratio"), [(100, 0.03), (7, 0.0), (50, 0.5), (1, 0.03)])
def test_equals_transformers(name: str, steps: int, warmup_ratio: float) -> None:
    theirs = their_rates(name, math.ceil(warmup_ratio * steps), steps)
    assert our_rates(name, warmup_ratio, steps) == pytest.approx(theirs, abs=1e-12)


def test_the_comparison_tells_the_schedules_apart() -> None:
    for name in THEIRS:
        others = [other for other in THEIRS if other != name]
        assert all(our_rates(other, 0.1, 50) != pytest.approx(their_rates(name, 5, 50), rel=1e-3) for other in others)


def test_every_name_of_the_recipe_has_a_schedule() -> None:
    names = ScheduleConfig.model_fields["name"].annotation.__args__
    assert set(names) == set(schedule.DECAYS) == set(THEIRS)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_last_rate_is_the_floor_and_never_above_the_peak(name: str) -> None:
    settings = ScheduleConfig(name=name, warmup_ratio=0.0, min_lr=1e-4)
    assert schedule.learning_rate(1000, 1000, 1e-3, settings) == pytest.approx(1e-4)
    assert schedule.learning_rate(500, 1000, 1e-3, settings) == pytest.approx(5.5e-4)
    assert schedule.learning_rate(1000, 1000, 1e-5, settings) == pytest.approx(1e-5)


def test_every_group_gets_its_component_rate_and_decay() -> None:
    groups = [
        {"component": component, "wd_mult": decayed, "betas": (0.5, 0.5), "eps": 1.0}  # as a checkpoint has them
        for component in schedule.COMPONENTS
        for decayed in (0.0, 1.0)
    ]
    settings = OptimizerConfig(lr=1e-3, lr_vision=1e-5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    schedule.apply(groups, 0, 10, settings, ScheduleConfig(warmup_ratio=0.0))
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-3, 1e-3, 1e-5, 1e-5]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1] * 3
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in groups)
