"""The operations that have backends: what each would take on a machine, which `tools/doctor.py` tells, and whether a
recipe's choices can run there.

An operation shows up by one line in `TABLE`: its name, where its `Operation` is, and what its obstacle functions are
asked about, made from an `Example` (device, dtype, shape) in the place of each tensor:

    Entry("rope", "rope", "ROPE", lambda like: (like(1, 4096, 32, like.head_width),)),

The inputs are the positional arguments with which the operation calls `select` after the backend's name. Nothing is
computed. An operation's backward pass has the forward's backends, and no line. A test keeps the table to the operations
there are.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops.attention_mask import AttentionCall, Band
from megatron_vlm.ops.dispatch import AUTO, Operation


@dataclass(frozen=True)
class Example:
    """Stands for a tensor of which only this is asked; it is called with a shape to give another one of its kind.

    `head_width` is that of the attention heads that a model has, `softcap` that of its scores, None for none; `slides`:
    whether a layer has a window shorter than its rows.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    head_width: int = 128
    softcap: float | None = None
    slides: bool = False

    def __call__(self, *shape: int) -> "Example":
        return replace(self, shape=shape)


@dataclass(frozen=True)
class Entry:
    """An operation of the table.

    Args:
        name: for people; as the recipe's key under `ops` where that is of this operation alone.
        module, attribute: of `megatron_vlm.ops`, where its `Operation` is; imported when it is asked about.
        inputs: of `Operation.select`, of the size they have in an 8B model with a tower of 1,152 channels.
        key: the recipe's under `ops`, where several operations have one.
    """

    name: str
    module: str
    attribute: str
    inputs: Callable[[Example], tuple[Any, ...]]
    key: str = ""

    @property
    def operation(self) -> Operation[Any]:
        """Itself."""
        operation = getattr(importlib.import_module(f"megatron_vlm.ops.{self.module}"), self.attribute)
        assert isinstance(operation, Operation)
        return operation


def _queries(like: Example) -> tuple[Any, ...]:
    """Queries of a causal row, with nothing hidden but what a window hides."""
    length, widths = 4096, (like.head_width, like.head_width)
    band = Band(1 - length // 2 if like.slides else None, 0)
    return like(1, length, 32, like.head_width), like.softcap, AttentionCall(length, length, widths, band, False)


TABLE = (
    Entry("attention", "attention", "ATTENTION", _queries),
    Entry("attention of blocks", "attention_blocks", "ATTENTION_INTO", _queries),
    Entry("norm", "norm", "NORM", lambda like: (like(4096, 1, 4096), like(4096))),
    Entry("activation", "activation", "GATED", lambda like: (like(4096, 1, 28672),)),
    Entry("rope", "rope", "ROPE", lambda like: (like(1, 4096, 32, like.head_width),)),
    Entry(
        "space to depth", "projector", "SPACE_TO_DEPTH", lambda like: (like(8, 729, 1152), like(4608), 2), "projector"
    ),
    Entry("bias and GELU", "projector", "BIAS_GELU", lambda like: (like(1568, 4096), like(4096)), "projector"),
    Entry(
        "linear into rows",
        "projector",
        "LINEAR_ROWS",
        lambda like: (like(1568, 4096), like(4096, 4096), like(4096, 4096)),
        "projector",
    ),
    Entry("prototypes", "prototypes", "PROTOTYPES", lambda like: (like(8, 576, 1024),), "projector"),
    Entry("frames", "frames", "FRAMES", lambda like: (like(8, 720, 1280, 3),)),
    Entry("fp8_quantise", "fp8", "QUANTISE", lambda like: (like(4096, 4096),)),
    Entry("fp8_matmul", "fp8", "MATMUL", lambda like: (like(4096, 4096), like(4096, 4096))),
)


@dataclass(frozen=True)
class Choice:
    """The backends of an operation on a device.

    Args:
        taken: what `auto` takes, or None where nothing can run.
        offered: backends that can run, in `auto`'s order.
        passed_over: backend -> why `auto` does not take it though it stands before what it takes; of those that cannot
            run, all.
    """

    name: str
    taken: str | None
    offered: tuple[str, ...]
    passed_over: dict[str, str] = field(default_factory=dict)


def choices(device: torch.device, dtype: torch.dtype) -> Iterator[Choice]:
    """Lists the choice of every operation in the table, for tensors of that kind."""
    for entry in TABLE:
        yield _choice(entry, Example(device, dtype))


def obstacles(requested: Mapping[str, Any], like: Example) -> list[str]:
    """Reasons why backends asked for by name cannot run, before anything is built or loaded.

    Args:
        requested: key under `ops` -> backend; other keys are not looked at. Of operations that share a key, those are
            meant that have the backend.
        like: of the model's tensors.

    Returns:
        A sentence for each key.
    """
    found: dict[str, str] = {}
    for entry in TABLE:
        key = entry.key or entry.name
        backend = requested.get(key, AUTO)
        if backend == AUTO or key in found:
            continue
        if entry.key and backend not in {one.name for one in entry.operation.backends}:
            continue
        try:
            entry.operation.find(backend, *entry.inputs(like))
        except ConfigError as error:
            found[key] = str(error)
    return list(found.values())


def check(requested: Mapping[str, Any], like: Example) -> None:
    """Raises ConfigError with all `obstacles`."""
    if found := obstacles(requested, like):
        raise ConfigError("; ".join(found))


def _choice(entry: Entry, like: Example) -> Choice:
    operation, inputs = entry.operation, entry.inputs(like)
    try:
        taken = operation.find(AUTO, *inputs).name
    except ConfigError:  # none can run: the reasons are in `passed_over`
        taken = None
    reasons = {backend.name: backend.unfit(*inputs) for backend in operation.backends}
    return Choice(
        entry.name,
        taken,
        tuple(backend.name for backend in operation.backends if backend.obstacle(*inputs) is None),
        {name: reason for name, reason in reasons.items() if reason is not None},
    )
