"""The FP8 cases of the kernel benchmark run, at a tiny size: every side gives what its neighbours give, about."""

import pytest
import torch

from tools.benchmarks.kernel_cases_fp8 import CASES, LINEAR, TINY, Fp8Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sides_agree(case: Fp8Case) -> None:
    inputs = case.make_inputs(TINY, torch.device("cpu"), torch.bfloat16)
    first, *others = (side(inputs) for side in case.backends.values())
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.2, atol=0.2)


def test_work() -> None:
    assert LINEAR.flops(TINY) == 2 * 24 * 32 * 48
    assert sum(LINEAR.flops(shape) for shape in LINEAR.shapes.values()) == 2 * 8192 * 4096 * (6144 + 4096 + 3 * 14336)
