"""The learning-rate schedule against transformers' cosine with warm-up, and rates per component."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from megatron_vlm.config.schema import OptimizerConfig, ScheduleConfig
from megatron_vlm.training import schedule


@pytest.mark.parametrize(("steps", "warmup_ratio"), [(100, 0.03), (7, 0.0), (50, 0.5), (1, 0.03)])
def test_cosine_equals_transformers(steps: int, warmup_ratio: float) -> None:
    settings = ScheduleConfig(warmup_ratio=warmup_ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    warmup = -(-int(warmup_ratio * 1000) * steps // 1000)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert schedule.learning_rate(step, steps, 3e-4, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_last_rate_is_the_floor_and_never_above_the_peak() -> None:
    settings = ScheduleConfig(warmup_ratio=0.0, min_lr=1e-4)
    assert schedule.learning_rate(1000, 1000, 1e-3, settings) == pytest.approx(1e-4)
    assert schedule.learning_rate(1000, 1000, 1e-5, settings) == pytest.approx(1e-5)


def test_every_group_gets_its_component_rate_and_decay() -> None:
    groups = [
        {"component": component, "wd_mult": decayed} for component in schedule.COMPONENTS for decayed in (0.0, 1.0)
    ]
    settings = OptimizerConfig(lr=1e-3, lr_vision=1e-5, weight_decay=0.1)
    schedule.apply(groups, 0, 10, settings, ScheduleConfig(warmup_ratio=0.0))
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-3, 1e-3, 1e-5, 1e-5]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1] * 3
