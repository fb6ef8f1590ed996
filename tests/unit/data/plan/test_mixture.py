"""Over a cycle each source comes exactly as often as its weight says, however the entries are ordered."""

import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from math import lcm

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.mixture import MOST_ENTRIES, Cycle, MixedPlan
from megatron_vlm.data.plan.order import Plan
from megatron_vlm.errors import DataError

weights = st.builds(Fraction, st.integers(1, 5), st.integers(1, 4))
parts = st.lists(st.tuples(st.integers(1, 7), weights), min_size=1, max_size=4)


def test_the_example_of_the_module() -> None:
    cycle = Cycle([4, 2, 6], [Fraction(1), Fraction(3), Fraction(1, 2)])
    assert (cycle.num_epochs, cycle.repeats, len(cycle)) == (2, (2, 6, 1), 26)
    samples = cycle.samples(np.arange(26)).tolist()
    assert samples == [0, 1, 2, 3] * 2 + [4, 5] * 6 + list(range(6, 12))
    assert cycle.source_of(np.array([0, 3, 4, 5, 6, 11])).tolist() == [0, 0, 1, 1, 2, 2]


@given(parts, st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_every_cycle_has_every_source_by_its_weight(
    parts: list[tuple[int, Fraction]], batch: int, seed: int, shuffle: bool
) -> None:
    sizes, weights = zip(*parts, strict=True)
    cycle = Cycle(sizes, weights)
    assert cycle.num_epochs == lcm(*(weight.denominator for weight in weights))
    plan = MixedPlan(Plan(len(cycle), seed, batch, shuffle), cycle)
    assert plan.num_rows == sum(size * weight for size, weight in parts) * cycle.num_epochs
    steps = range(-(-2 * len(cycle) // batch))
    stream = [sample for step in steps for row in plan.samples_by_row(step) for sample in row]
    for number in range(2):
        counts = Counter(stream[number * len(cycle) : (number + 1) * len(cycle)])
        first = 0
        for size, weight in parts:
            assert [counts.pop(sample) for sample in range(first, first + size)] == [weight * cycle.num_epochs] * size
            first += size
        assert not counts


def test_a_plain_cycle_is_its_samples() -> None:
    cycle, values = Cycle([3, 2], [Fraction(1)] * 2), np.arange(5)
    assert cycle.is_plain and cycle.spread(values) is values
    assert not Cycle([3], [Fraction(2)]).is_plain


def test_a_cycle_that_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"come out even after 1,000 epochs alone, of .* such as 0\.3 or 1/3 for 0\.333"
    ):
        Cycle([665_000, 50_000], [Fraction("0.333"), Fraction(1)])
    assert len(Cycle([MOST_ENTRIES + 1], [Fraction(1)])) == MOST_ENTRIES + 1  # is no fault of weights


def test_a_million_samples_are_planned_in_a_second() -> None:
    """Their numbers are never Python's: the plan of a step takes some arrays."""
    tracemalloc.start()
    started = time.perf_counter()
    cycle = Cycle([600_000, 300_000, 100_000], [Fraction(1), Fraction(3), Fraction(1, 2)])
    MixedPlan(Plan(len(cycle), 1, 128), cycle).samples_by_row(0)
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cycle) == 3_100_000 and peak < 128 * 2**20 and seconds < 10  # under any load; idle it is 0.3 s
    started = time.perf_counter()
    for step in range(1, 21):
        MixedPlan(Plan(len(cycle), 1, 128), cycle).samples_by_row(step)
    assert (time.perf_counter() - started) / 20 < 0.1
