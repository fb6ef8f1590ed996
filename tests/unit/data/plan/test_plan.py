"""The plan gives every sample once per epoch, in an order that depends on seed and step alone."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.grouped import GroupedPlan
from megatron_vlm.data.plan.order import Plan


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


def samples_of(num_with_images: int, num_text: int) -> SimpleNamespace:
    """A mix as LLaVA's: some images of 40 tokens, and texts of any length."""
    random = np.random.default_rng(num_with_images)
    images = random.permutation(np.r_[random.integers(1, 4, num_with_images), np.zeros(num_text, int)])
    return SimpleNamespace(tokens=images * 40 + random.integers(5, 200, len(images)), images=images)


sizes = st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(any)


@given(sizes, st.integers(1, 9), st.integers(0, 99))
def test_grouped_epochs_have_every_sample_once(num: tuple[int, int], batch: int, seed: int) -> None:
    """Also where epochs begin and end inside a step: the first e epochs together bring every sample e times."""
    samples = samples_of(*num)
    plan, num_samples, seen = GroupedPlan(samples, seed, batch), sum(num), Counter()
    for step in range(4 * num_samples // batch):
        rows = plan.rows(step)
        assert len(rows) == batch
        seen.update(rows)
        done = (step + 1) * batch // num_samples
        assert all(seen[sample] in (done, done + 1) for sample in range(num_samples))


@given(sizes, st.integers(1, 9), st.integers(0, 30))
def test_a_grouped_step_needs_no_history(num: tuple[int, int], batch: int, step: int) -> None:
    samples = samples_of(*num)
    walked = GroupedPlan(samples, 3, batch)
    for earlier in range(step):
        walked.rows(earlier)
    assert walked.rows(step) == GroupedPlan(samples, 3, batch).rows(step)


@given(sizes, st.integers(1, 9))
def test_batches_have_one_modality_but_for_what_is_left(num: tuple[int, int], batch: int) -> None:
    """Per epoch at most the step at either end and one of leftovers are mixed."""
    samples = samples_of(*num)
    plan, steps = GroupedPlan(samples, 1, batch), 3 * sum(num) // batch
    mixed = sum(len({bool(samples.images[row]) for row in plan.rows(step)}) == 2 for step in range(steps))
    assert mixed <= 2 * 3 + 1


def padding(plan: Plan, samples: SimpleNamespace, steps: int) -> float:
    """Share of the padded tokens that are none."""
    batches = [samples.tokens[plan.rows(step)] for step in range(steps)]
    return 1 - sum(b.sum() for b in batches) / sum(b.max() * len(b) for b in batches)


def test_grouping_saves_padding() -> None:
    samples = samples_of(1200, 800)
    grouped, plain = (padding(plan, samples, 125) for plan in (GroupedPlan(samples, 1, 16), Plan(2000, 1, 16)))
    assert grouped < 0.06 < 0.4 < plain


def test_grouped_batches_come_in_random_order_and_differ_between_epochs() -> None:
    samples = samples_of(1200, 800)
    plan = GroupedPlan(samples, 1, 16)
    first, second = ([frozenset(plan.rows(epoch * 125 + step)) for step in range(125)] for epoch in (0, 1))
    assert len(set(first) & set(second)) < 10
    with_images = [bool(samples.images[next(iter(batch))]) for batch in first]
    changes = sum(a != b for a, b in zip(with_images, with_images[1:], strict=False))
    assert 40 < changes < 80  # 125 batches, 3 of 5 with images: about 60 in random order, 1 if one came after the other


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ranks_get_even_shares(ranks: int, micro_batch: int) -> None:
    samples = samples_of(1200, 800)
    plan, random = GroupedPlan(samples, 1, 64), np.random.default_rng(0)

    def spread(rows: list[int]) -> int:
        """Between the rank with most tokens and that with fewest; rows are dealt out in turn."""
        shares = samples.tokens[rows].reshape(-1, ranks, micro_batch).sum(axis=(0, 2))
        return int(shares.max() - shares.min())

    dealt = [plan.rows(step) for step in range(30)]
    descending = [sorted(rows, key=lambda row: -samples.tokens[row]) for rows in dealt]
    unordered = [random.permutation(rows).tolist() for rows in dealt]
    assert sum(map(spread, dealt)) < 0.65 * min(sum(map(spread, descending)), sum(map(spread, unordered)))


def test_grouped_order_is_frozen() -> None:
    samples = SimpleNamespace(tokens=np.array([5, 9, 7, 3, 8, 6, 4]), images=np.array([1, 0, 1, 0, 1, 0, 1]))
    rows = [GroupedPlan(samples, 42, 2).rows(step) for step in range(8)]
    assert rows == [[1, 3], [4, 6], [2, 0], [5, 3], [4, 0], [2, 6], [1, 5], [2, 6]]
