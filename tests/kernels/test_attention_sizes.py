"""The sizes of attention's kernels on a GPU, which the interpreter never asks for: they fit what a program has.

Shared memory is counted as the kernels' docstrings say, and the sums of the backward kernels as registers of a thread.
"""

import importlib.util
import itertools
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARED_BYTES = {True: 227 * 1024, False: 99 * 1024}  # of a program, on Hopper and on a workstation's GPU
SUM_REGISTERS = {False: 128, True: 64}  # of a thread's 255; at widths above 128


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm_kernels import attention, attention_backward

    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "is_interpreted", lambda: False)


def sane(blocks: Any) -> bool:
    """Powers of two of at least 16, the least that a matrix product takes."""
    sizes = blocks.queries, blocks.keys
    return all(size >= 16 and size & (size - 1) == 0 for size in sizes) and blocks.num_warps in (4, 8)


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("num_queries", [1, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize(("width", "dtype"), list(itertools.product(WIDTHS, DTYPES)), ids=str)
def test_forward_fits(width: int, dtype: torch.dtype, num_queries: int, hopper: bool) -> None:
    from megatron_vlm_kernels.attention import forward_blocks

    blocks = forward_blocks(width, dtype, hopper, num_queries)
    numbers = blocks.queries * width + blocks.num_stages * blocks.keys * 2 * width
    assert sane(blocks) and numbers * dtype.itemsize <= SHARED_BYTES[hopper], blocks
    threads = 32 * blocks.num_warps
    assert blocks.queries * width / threads <= 128, blocks
    if dtype == torch.float32 and width > 128:  # products without tensor cores unroll whole tiles
        assert blocks.queries * blocks.keys <= threads, blocks


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize(("width", "dtype"), list(itertools.product(WIDTHS, DTYPES)), ids=str)
def test_backward_fits(width: int, dtype: torch.dtype, of_keys: bool, hopper: bool) -> None:
    from megatron_vlm_kernels.attention_backward import backward_blocks

    blocks = backward_blocks(width, dtype, hopper, of_keys)
    kept, passing = (blocks.keys, blocks.queries) if of_keys else (blocks.queries, blocks.keys)
    numbers = (kept + blocks.num_stages * passing) * 2 * width
    assert sane(blocks) and numbers * dtype.itemsize <= SHARED_BYTES[hopper], blocks
    sums = kept * width * (2 if of_keys else 1)
    assert sums / (32 * blocks.num_warps) <= SUM_REGISTERS[width > 128], blocks
