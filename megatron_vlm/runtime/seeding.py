"""Every source of random numbers, from one seed.

Python, numpy and torch get a seed that differs between pipeline stages only, as in Megatron: ranks that hold the same
parameter must draw the same numbers for it. megatron-core's tracker then has the streams that differ over tensor ranks
(dropout inside a split layer). Order of data does not come from here: plans carry their own generators.
"""

import random
from typing import Protocol

import numpy as np
import torch

_STAGE_STRIDE = 100  # Megatron's distance between the seeds of two stages


class _Coordinates(Protocol):
    @property
    def pipeline(self) -> int: ...


class PlacedRank(Protocol):
    """The part of `parallel.groups.Grid` needed here (runtime is below parallel)."""

    @property
    def coordinates(self) -> _Coordinates: ...


def seed_everything(seed: int, grid: PlacedRank) -> None:
    """Seeds Python, numpy, torch and megatron-core's tracker. The grid's groups exist already."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    own = seed + _STAGE_STRIDE * grid.coordinates.pipeline
    random.seed(own)
    np.random.seed(own % 2**32)
    model_parallel_cuda_manual_seed(own)
    torch.manual_seed(own)
