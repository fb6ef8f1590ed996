"""When a difference is one."""

import math

import pytest

from megatron_vlm.training.layout_check.compare import first_difference
from megatron_vlm.training.layout_check.difference import Allowance, Comparison, Difference, largest
from megatron_vlm.training.layout_check.hints import BY_PHASE, EVERY_GRADIENT, NORM_GRADIENT, OTHER_GRADIENT, hint_of


def difference(distance: float, tensor: str = "x", phase: str = "language backward", scale: float = 2.0) -> Difference:
    return Difference(phase, "gradient of", tensor, distance, Allowance(scale, 1e-5))


@pytest.mark.parametrize(
    ("distance", "scale", "holds"),
    [(2e-5, 2.0, True), (2.1e-5, 2.0, False), (0.0, 0.0, True), (1e-30, 0.0, False), (math.nan, 2.0, False)],
)
def test_what_holds(distance: float, scale: float, holds: bool) -> None:
    assert difference(distance, scale=scale).holds == holds


def test_a_nan_is_the_largest() -> None:
    assert math.isnan(largest([math.nan, 1.0])) and math.isnan(largest([1.0, math.nan]))
    assert largest([1.0, 3.0, 2.0]) == 3.0 and largest([]) == 0.0


def test_the_first_difference_in_order() -> None:
    comparisons = [
        Comparison("a", (difference(0.0),)),
        Comparison("b", (difference(0.0), difference(1.0, "y"), difference(9.0, "z"))),
        Comparison("c", (difference(9.0, "w"),)),
    ]
    first = first_difference(comparisons)
    assert first is not None and first.tensor == "y"
    assert str(first) == "gradient of y is off by 5.0e-01 of its norm (allowed 1e-05)"
    assert comparisons[1].worst == 4.5
    assert first_difference(comparisons[:1]) is None


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"head", "layernorm", "qkv"}, EVERY_GRADIENT),
        ({"layernorm"}, NORM_GRADIENT),
        ({"qkv"}, OTHER_GRADIENT),
        ({"qkv", "layernorm"}, NORM_GRADIENT),
    ],
)
def test_hints_for_gradients(wrong: set[str], hint: str) -> None:
    found = tuple(difference(float(name in wrong), name) for name in ("head", "layernorm", "qkv"))
    tower = difference(0.0, "vision.x", "vision backward")
    comparisons = [Comparison("gradients", (*found, tower))]
    first = comparisons[0].first
    assert first is not None and hint_of(first, comparisons) == hint


def test_every_other_phase_has_a_hint() -> None:
    for phase, hint in BY_PHASE.items():
        assert hint_of(difference(1.0, phase=phase), []) == hint
