"""Which rank holds the others up."""

import pytest

from tests.helpers.reports import comparison

IDLE = {"data": [0.0] * 4}


def test_the_spread_names_the_largest() -> None:
    ranks = comparison({**IDLE, "encode": [0.1, 0.2, 0.4, 0.1]}, [1, 2, 3, 2])
    spread = ranks.phases["encode"]
    assert (spread.mean, spread.max, spread.rank) == (pytest.approx(0.2), 0.4, 2)
    assert (ranks.peak_memory.mean, ranks.peak_memory.max, ranks.peak_memory.rank) == (2, 3, 2)


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ({**IDLE, "encode": [0.1, 0.1, 0.1, 0.16]}, (3, "encode")),
        ({**IDLE, "encode": [0.1, 0.1, 0.1, 0.14]}, None),  # less than half as much again
        ({**IDLE, "encode": [0.001, 0.001, 0.001, 0.010]}, None),  # a few milliseconds
        ({"data": [0.0, 0.5, 0.0, 0.0], "encode": [0.1, 0.1, 0.1, 0.3]}, (1, "data")),  # the worse one
        ({**IDLE, "encode": [0.1] * 4, "pipeline": [0.1, 0.9, 0.1, 0.1]}, None),  # waits for others
    ],
)
def test_only_own_work_names_a_rank(phases: dict[str, list[float]], expected: tuple[int, str] | None) -> None:
    straggler = comparison(phases).straggler
    assert (None if straggler is None else (straggler.rank, straggler.phase)) == expected


def test_two_ranks_are_compared_with_each_other_and_one_with_none() -> None:
    two = comparison({"data": [0.0] * 2, "encode": [0.1, 0.2]}).straggler
    assert two is not None and (two.rank, two.median_seconds) == (1, 0.1)
    assert comparison({"data": [5.0], "encode": [0.1]}).straggler is None
