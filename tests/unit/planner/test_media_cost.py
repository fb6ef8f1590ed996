"""What encoding costs: the fit on known numbers, and a small tower measured at several sizes."""

from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError

from megatron_vlm.config.schema import VisionCostConfig
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.parallel.media_plan import MediaCost
from megatron_vlm.planner import media_cost
from megatron_vlm.planner.media_cost import fastest_seconds, fit_cost, measure_encoder
from tests.helpers.models.tiny import tiny_recipe


def points(linear: float, quadratic: float, sizes: tuple[int, ...] = (49, 196, 441)) -> list[tuple[int, float]]:
    return [(size, MediaCost(linear, quadratic).of(size)) for size in sizes]


@pytest.mark.parametrize(("linear", "quadratic"), [(2e-5, 3e-8), (1e-6, 0.0), (0.0, 4e-8)])
def test_a_fit_finds_what_was_put_in(linear: float, quadratic: float) -> None:
    found = fit_cost(points(linear, quadratic))
    assert found.linear == pytest.approx(linear, rel=1e-9, abs=1e-15)
    assert found.quadratic == pytest.approx(quadratic, rel=1e-9, abs=1e-18)


def test_coefficients_are_never_negative() -> None:
    falling = fit_cost([(100, 1.0), (200, 1.5), (400, 2.0)])  # less than in proportion
    assert falling.quadratic == 0 and falling.linear > 0
    steep = fit_cost([(100, 1.0), (200, 5.0), (400, 30.0)])  # more than with the square
    assert steep.linear == 0 and steep.quadratic > 0


def test_one_size_gives_a_line() -> None:
    assert fit_cost([(50, 2.0)]) == MediaCost(0.04, 0.0)
    assert fit_cost([(50, 2.0), (50, 2.0)]).of(50) == pytest.approx(2.0)


def test_a_clock_too_coarse_is_no_division_by_zero() -> None:
    assert fit_cost([(16, 0.0), (32, 0.0)]).of(16) > 0


def test_the_fastest_run_counts_after_one_to_warm_up() -> None:
    clock = iter([10, 10.25, 20, 20.125, 30, 30.1875, 40])
    calls = mock.Mock()
    with mock.patch.object(media_cost.time, "process_time", lambda: next(clock)):
        assert fastest_seconds(calls, torch.device("cpu"), 3) == 0.125
    assert calls.call_count == 4


def test_what_takes_long_is_not_repeated() -> None:
    clock, calls = iter([10, 10.25, 20, 20.5, 30]), mock.Mock()
    with mock.patch.object(media_cost.time, "process_time", lambda: next(clock)):
        assert fastest_seconds(calls, torch.device("cpu"), 3, warm=False) == 0.25
    assert calls.call_count == 2


def encoder(tmp_path: Any, **vision: Any) -> Any:
    from megatron_vlm.models.vision.encoder import VisionEncoder

    config = tiny_recipe(tmp_path, model={"vision": vision} if vision else {})
    return VisionEncoder(survey_tower(config.model.vision, None), config, 64, 0)


def test_a_tower_is_measured_at_three_sizes_and_left_as_it_was(tmp_path: Any) -> None:
    tested = encoder(tmp_path).train()
    seen: list[tuple[int, ...]] = []
    tested.tower.model.register_forward_pre_hook(
        lambda _model, _inputs, named: seen.append(tuple(named["pixel_values"].shape)), with_kwargs=True
    )
    measured: list[list[tuple[int, float]]] = []
    with mock.patch.object(media_cost, "fit_cost", lambda found: measured.append(found) or fit_cost(found)):
        cost = measure_encoder(tested)
    assert {shape[2:] for shape in seen} == {(14, 14), (28, 28), (42, 42)}
    assert [patches for patches, _ in measured[0]] == [4, 16, 36]
    assert cost.linear >= 0 and cost.quadratic >= 0 and cost.of(16) > 0
    assert tested.training and all(parameter.grad is None for parameter in tested.parameters())


def test_a_tower_of_one_size_is_measured_there(tmp_path: Any) -> None:
    tested = encoder(tmp_path)
    with mock.patch.object(media_cost, "RESIZES", "no such argument"):
        cost = measure_encoder(tested)
    assert cost.quadratic == 0 and cost.linear > 0


def test_half_of_a_towers_only_patch_is_not_measured(tmp_path: Any) -> None:
    settings = tiny_recipe(tmp_path).model.vision.config
    assert settings is not None
    tested = encoder(tmp_path, config={**settings, "image_size": settings["patch_size"]})
    measured: list[list[tuple[int, float]]] = []
    with mock.patch.object(media_cost, "fit_cost", lambda found: measured.append(found) or fit_cost(found)):
        measure_encoder(tested)
    assert [patches for patches, _ in measured[0]] == [1, 1]


@pytest.mark.parametrize("cost", [{"linear": 0}, {"quadratic": 1.0}, {"linear": 1.0, "quadratic": -1.0}])
def test_a_cost_of_nothing_or_less_is_refused(cost: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        VisionCostConfig(**cost)


def test_a_given_cost_is_the_towers(tmp_path: Any) -> None:
    given = encoder(tmp_path, cost={"linear": 2.0, "quadratic": 0.25}).tower.survey.media_spec
    assert given.cost == MediaCost(2.0, 0.25) and given.cost.of(given.num_patches) == 32 + 64
