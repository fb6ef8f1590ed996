"""The table of projectors: how a tower's features become rows of the language model's width.

A projector is built from (vision width, language width) and maps [n, t, vision] -> [n, t', language]; t' is t, or fewer
where it joins neighbouring patches. What t' is, one trial on the meta device tells (`count_rows`). Its parameters have
their published names, so that weights move by name: LLaVA's `0.weight`, `2.weight`, VILA's `layers.1.weight`.
"""

from collections.abc import Callable

import torch
from torch import nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.registry import Registry

PatchGrid = tuple[int, int]
REFERENCE = "reference"  # the backend that every operation has everywhere

ProjectorBuilder = Callable[[int, int], nn.Module]
PROJECTORS: Registry[ProjectorBuilder] = Registry("projector")


class OpsProjector(nn.Module):
    """A projector made of operations that have backends.

    `backend` is the recipe's `ops.projector`; `grid` the patches of an image along its height and width, None where
    nobody said (weights are only moved, or the image is square).
    """

    backend: str = AUTO
    grid: PatchGrid | None = None


def build_projector(
    name: str, vision_size: int, language_size: int, backend: str = AUTO, grid: PatchGrid | None = None
) -> nn.Module:
    """The projector of that name, mapping [n, t, vision_size] -> [n, t', language_size], random weights.

    Args:
        backend: of its operations.
        grid: the tower's patches (along the height, along the width), row by row in t; default: a square number.

    Raises:
        ConfigError: an unknown name, the projector cannot join the two sizes, or a backend is asked for by name and the
            projector has no operation with backends.
    """
    projector = PROJECTORS.get(name)(vision_size, language_size)
    if (reason := backend_obstacle(projector, name, backend)) is not None:
        raise ConfigError(reason)
    if isinstance(projector, OpsProjector):
        projector.backend, projector.grid = backend, grid
    return projector


def backend_obstacle(projector: nn.Module, name: str, backend: str) -> str | None:
    """Reason why a projector of that name has no use for the backend, or None."""
    if backend == AUTO or isinstance(projector, OpsProjector):
        return None
    return (
        f"ops.projector: found {backend!r} with model.projector.type {name!r}, which has no operation with backends, "
        f"needs {AUTO!r}"
    )


def count_rows(name: str, num_tokens: int, vision_size: int, grid: PatchGrid | None = None) -> int:
    """Rows that an image of so many tokens becomes. `grid`: as `build_projector` takes it.

    Raises:
        ConfigError: as `build_projector`, or the projector does not take that number of tokens.
    """
    with torch.device("meta"):
        projector = build_projector(name, vision_size, vision_size, grid=grid)
        if isinstance(projector, OpsProjector):
            projector.backend = REFERENCE  # nothing is computed, so nothing is chosen, or said to be
        rows: int = projector(torch.empty(1, num_tokens, vision_size)).shape[1]
    return rows
