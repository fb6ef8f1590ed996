"""The one measure of a kernel: its error against fp64 is at most twice that of plain torch in the same dtype.

(Dao et al. 2022, the flash-attention tests.) Error is the norm of the difference over the norm, per tensor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = {torch.float32: 6e-8, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}  # half a unit of rounding, of any tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor, both in fp64."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_as_exact(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Compares outputs and gradients by name.

    Args:
        ours: from the kernel.
        plain: from plain torch, on inputs of the same dtype.
        exact: from plain torch in fp64, on the same values.
    """
    assert ours.keys() == plain.keys() == exact.keys(), f"{ours.keys()} {plain.keys()} {exact.keys()}"
    for name, tensor in ours.items():
        assert tensor.shape == exact[name].shape, f"{name}: {tuple(tensor.shape)}, needs {tuple(exact[name].shape)}"
        found, allowed = error(tensor, exact[name]), FACTOR * error(plain[name], exact[name])
        allowed = max(allowed, FLOOR[tensor.dtype])
        assert found <= allowed, f"{name}: error {found:.2e}, allowed {allowed:.2e}"
