"""The plan gives every sample once per epoch, in an order that depends on seed and step alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan import Plan


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 99), st.booleans())
def test_every_epoch_has_every_sample_once(num_samples: int, batch: int, seed: int, shuffle: bool) -> None:
    plan = Plan(num_samples, seed, batch, shuffle)
    stream = [row for step in range(3 * num_samples // batch + 1) for row in plan.rows(step)]
    assert all(len(plan.rows(step)) == batch for step in range(3))
    for epoch in range(len(stream) // num_samples):
        assert sorted(stream[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))
    if not shuffle:
        assert stream == [i % num_samples for i in range(len(stream))]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 20))
def test_a_step_needs_no_history(num_samples: int, batch: int, step: int) -> None:
    walked = Plan(num_samples, 3, batch)
    for earlier in range(step):
        walked.rows(earlier)
    assert walked.rows(step) == Plan(num_samples, 3, batch).rows(step)


def test_batch_size_only_cuts_the_stream() -> None:
    """Another global batch size sees the same order."""
    whole, halves = Plan(30, 5, 20), Plan(30, 5, 10)
    assert whole.rows(1) == halves.rows(2) + halves.rows(3)


def test_epochs_and_seeds_differ() -> None:
    first, second = Plan(50, 1, 50).rows(0), Plan(50, 1, 50).rows(1)
    assert first != second and first != Plan(50, 2, 50).rows(0) and second != Plan(50, 2, 50).rows(0)


@pytest.mark.parametrize(("step", "rows"), [(0, [4, 1, 3, 6]), (1, [0, 2, 5, 1])])
def test_order_is_frozen(step: int, rows: list[int]) -> None:
    """A run resumed under another numpy must go on where it was; these numbers may never change."""
    assert Plan(7, 42, 4).rows(step) == rows
