"""A step's samples in few rows: each in one, little padding, even work, and what a pipeline's schedule wants."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.batch_exact import LayerWork, StepLimits, lay_out, pack, spread
from megatron_vlm.models.architectures import load_language_config
from tests.helpers.models.tiny import tiny_recipe
from tools.benchmarks.media.draws import SEQUENCE_LENGTH, draw

WORK = LayerWork((None, None), 200.0)
DRAWS = [np.array([sample.tokens for sample in draw(seed, 32)]) for seed in range(20)]

limits_of_steps = st.builds(
    StepLimits,
    row_length=st.just(64),
    micro_batch_size=st.integers(1, 4),
    num_ranks=st.integers(1, 4),
    num_stages=st.integers(1, 3),
    interleaved=st.booleans(),
    media_window=st.none(),
)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), limits_of_steps, st.booleans())
def test_every_sample_is_in_one_row_of_the_step(lengths: list[int], limits: StepLimits, has_windows: bool) -> None:
    if has_windows:
        limits = StepLimits(**{**vars(limits), "media_window": 2 * limits.num_stages})
    tokens = np.array(lengths)
    by_rank = lay_out(tokens, WORK, limits)
    rows = [row for of_rank in by_rank for rows in of_rank for row in rows]
    assert sorted(item for row in rows for item in row) == list(range(len(tokens)))
    assert all(tokens[row].sum() <= limits.row_length for row in rows)
    (number,) = {len(of_rank) for of_rank in by_rank}
    sizes = Counter(len(rows) for of_rank in by_rank for rows in of_rank)
    assert len(by_rank) == limits.num_ranks and 1 <= min(sizes) and max(sizes) <= limits.micro_batch_size
    assert lay_out(tokens, WORK, limits) == by_rank
    if limits.num_stages > 1:
        assert len(sizes) == 1
        assert number >= min(limits.num_stages, -(-len(tokens) // limits.num_ranks))
        if limits.interleaved or (limits.media_window is not None and number > limits.media_window):
            assert number % limits.num_stages == 0


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_little_of_the_rows_is_padding(ranks: int, micro_batch_size: int) -> None:
    """On the draw of `bench.py packing`: each micro-batch as long as its longest row, and with a pipeline all rows
    (of 32 samples over 2 ranks and 2 stages some are a single long one, beside which the others are short)."""
    ratios, of_pipeline = [], []
    for tokens in DRAWS:
        by_rank = lay_out(tokens, WORK, StepLimits(SEQUENCE_LENGTH, micro_batch_size, ranks))
        padded = sum(len(rows) * max(tokens[row].sum() for row in rows) for of_rank in by_rank for rows in of_rank)
        ratios.append(padded / tokens.sum())
        by_rank = lay_out(tokens, WORK, StepLimits(SEQUENCE_LENGTH, micro_batch_size, ranks, num_stages=2))
        rows = [row for of_rank in by_rank for of_one in of_rank for row in of_one]
        of_pipeline.append(len(rows) * max(tokens[row].sum() for row in rows) / tokens.sum())
    assert np.mean(ratios) < 1.05 and max(ratios) <= 1.1, ratios
    assert ranks > 1 or max(of_pipeline) <= 1.1, of_pipeline


@pytest.mark.parametrize("stages", [1, 2])
def test_rows_are_few(stages: int) -> None:
    """Hardly more than the tokens fill."""
    for tokens in DRAWS:
        by_rank = lay_out(tokens, WORK, StepLimits(SEQUENCE_LENGTH, 1, num_stages=stages))
        assert sum(map(len, by_rank)) <= -(-tokens.sum() // SEQUENCE_LENGTH) + 1


def test_ranks_have_even_work() -> None:
    """Attention's square counted: dealt by tokens alone, or as they come, ranks with long samples have more."""
    random, each = np.random.default_rng(0), 300.0
    of_model, by_tokens = LayerWork((None,), each), LayerWork((1,), 1e6)
    for stages, most, least in ((1, 1.01, 1.05), (2, 1.12, 1.15)):
        found: dict[str, list[float]] = {"even": [], "uneven": []}
        for _ in range(20):
            tokens = random.lognormal(5, 1, 128).clip(1, 2048).astype(int)
            limits = StepLimits(2048, 2, 4, num_stages=stages)
            for how, work in (("even", of_model), ("uneven", by_tokens)):
                by_rank = lay_out(tokens, work, limits)
                length = max(tokens[row].sum() for of_rank in by_rank for rows in of_rank for row in rows)
                linear = [sum(length if stages > 1 else tokens[row].sum() for rows in of_rank for row in rows)
                          for of_rank in by_rank]  # fmt: skip
                pairs = [sum(of_model.pairs(tokens)[row].sum() for rows in of_rank for row in rows)
                         for of_rank in by_rank]  # fmt: skip
                total = each * np.array(linear) + np.array(pairs)
                found[how].append(float(total.max() / total.mean()))
        even, uneven = np.mean(found["even"]), np.mean(found["uneven"])
        assert even < most < least < uneven, (stages, even, uneven)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5))
def test_rows_are_filled_evenly(lengths: list[int], fewest: int) -> None:
    tokens = np.array(lengths)
    rows = pack(tokens, 50, min(fewest, len(lengths)))
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(tokens[row].sum() <= 50 for row in rows)
    groups = spread(lengths, fewest)
    sums = [sum(lengths[item] for item in group) for group in groups]
    assert max(sums) - min(sums) <= max(lengths), "the fullest was the emptiest before its last item"


def test_a_step_is_laid_out_in_5_ms() -> None:
    tokens = np.array([sample.tokens for sample in draw(0, 256)])
    for limits in (StepLimits(SEQUENCE_LENGTH, 1, 8), StepLimits(SEQUENCE_LENGTH, 1, 8, num_stages=4)):
        seconds = []
        for _ in range(15):
            started = time.process_time()
            lay_out(tokens, WORK, limits)
            seconds.append(time.process_time() - started)
        assert sorted(seconds)[7] < 5e-3


def test_the_work_is_the_models(tmp_path) -> None:
    """Of 4 layers: 64 x (64 + 2 x 32) and 64 x 64 for attention, 3 x 64 x 128 for the MLP, heads 64 wide together."""
    found = LayerWork.of(load_language_config(tiny_recipe(tmp_path).model.language))
    assert found.windows == (None,) * 4
    assert found.token_pairs == 4 * (64 * 128 + 64 * 64 + 3 * 64 * 128) / (2 * 64)
    assert LayerWork((None, 3), 0.0).pairs(np.array([1, 5])).tolist() == [2, 15 + 12]


def test_a_sample_that_no_row_holds_is_refused() -> None:
    with pytest.raises(AssertionError, match="lengths that no row can hold"):
        lay_out(np.array([3, 65]), WORK, StepLimits(64, 1))
