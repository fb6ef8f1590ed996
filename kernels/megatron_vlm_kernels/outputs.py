"""The dtype in which a kernel stores what it returns in bf16.

Triton's interpreter cuts a number off where the hardware rounds it to the nearest bf16, so its errors are twice as
large and all of one sign. There kernels store fp32, and torch rounds; on a GPU nothing changes.
"""

import torch

from megatron_vlm_kernels import is_interpreted


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel writes; the launcher casts it to `dtype`, which is free where it is that already."""
    return torch.float32 if dtype is torch.bfloat16 and is_interpreted() else dtype
