"""Every source of random numbers: from one seed at the start, from a saved state on resume.

Python, numpy and torch get a seed that differs between pipeline stages only, as in Megatron: ranks that hold the same
parameter must draw the same numbers for it. megatron-core's tracker then has the streams that differ over tensor ranks
(dropout inside a split layer). Order of data does not come from here: plans carry their own generators.

The state of all of them is one dictionary of tensors and plain values, so that a checkpoint can hold it without a
pickle that would have to be trusted.
"""

import random
from typing import Any, Protocol

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


def seed_everything(seed: int, grid: PlacedRank, step: int = 0) -> None:
    """Seeds Python, numpy, torch and megatron-core's tracker. The grid's groups exist already.

    Args:
        step: updates made; other streams for every number, the recipe's seed itself for 0.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if step:
        seed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    own = seed + _STAGE_STRIDE * grid.coordinates.pipeline
    random.seed(own)
    np.random.seed(own % 2**32)
    model_parallel_cuda_manual_seed(own)
    torch.manual_seed(own)


def random_states() -> dict[str, Any]:
    """States of every random stream of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def are_of_this_device(states: dict[str, Any]) -> bool:
    """Whether `random_states` was called on a device whose generator has states as this one's (CPU, CUDA)."""
    found: torch.Tensor = states["device"]
    return found.numel() == torch.cuda.get_rng_state().numel()


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts every stream where `random_states` found it; the states `are_of_this_device`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, *rest = states["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    get_cuda_rng_tracker().set_states(states["tracker"])
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["torch"])
