"""The number of steps that so many epochs are."""

import pytest

from megatron_vlm.training.epochs import count_steps


@pytest.mark.parametrize(
    ("epochs", "num_rows", "global_batch_size", "steps"),
    [
        (1.0, 665_298, 128, 5197),  # LLaVA-1.5's second phase
        (2.0, 5, 3, 3),  # a step goes across the end of an epoch
        (0.5, 24, 8, 1),
        (1.0, 7, 8, 0),
        (0.29, 100, 1, 29),  # as written: 0.29 * 100 is 28.999... in floating point
        (1e-9, 10**9, 1, 1),
        (3.0, 10**12, 1, 3 * 10**12),
    ],
)
def test_whole_global_batches_are_counted(epochs: float, num_rows: int, global_batch_size: int, steps: int) -> None:
    assert count_steps(epochs, num_rows, global_batch_size) == steps
