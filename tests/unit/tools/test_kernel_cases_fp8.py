"""What the kernel benchmark says of FP8: the error that its tolerance allows, and work of the layers."""

import pytest
import torch

from megatron_vlm.ops.fp8 import E4M3, E5M2
from tools.benchmarks.kernels.cases_fp8 import LINEAR_CASE, PRODUCT_CASE, TINY, TOLERANCE

SIZE = TINY[0]


def rounding(dtype: torch.dtype) -> float:
    """Error of normally distributed numbers as a share of their norm."""
    x = 50 * torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float((x.to(dtype).double() - x).norm() / x.norm())


def test_the_tolerance_is_derived() -> None:
    """Two tensors in E4M3; one of them in E5M2; a bit lost in both is not allowed."""
    four, five = rounding(E4M3), rounding(E5M2)
    assert (four, five) == (pytest.approx(0.026, abs=1e-3), pytest.approx(0.053, abs=1e-3))
    assert 2**0.5 * four < (four**2 + five**2) ** 0.5 < TOLERANCE < 2**0.5 * five


def test_work() -> None:
    forward, backward = LINEAR_CASE.work(SIZE, 2)
    assert (forward.flops, backward.flops) == (2 * 24 * 32 * 48, 4 * 24 * 32 * 48)
    assert forward.num_bytes == 2 * (24 * 32 + 32 * 48 + 24 * 48)
    assert PRODUCT_CASE.work(SIZE, 2)[0].num_bytes == 24 * 32 + 32 * 48 + 2 * 24 * 48
    whole = sum(LINEAR_CASE.work(sizes, 2)[0].flops for sizes in LINEAR_CASE.sizes)
    assert whole == 2 * 8192 * 4096 * (6144 + 4096 + 3 * 14336)
