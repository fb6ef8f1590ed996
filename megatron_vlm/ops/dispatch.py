"""Choice of the backend that computes an operation, with the reason against each other one (DESIGN D8).

A backend states what hinders it on given inputs; nobody probes by trying. `auto` takes the first one without an
obstacle, in the order of registration, and logs once what it took; a backend asked for by name either runs or raises
with the reason. The hazard this removes is the silent fallback to a slow or less exact path. A backend may run where
`auto` should never take it, as our kernels under Triton's interpreter on a CPU: that is its `objection`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import Registry
from megatron_vlm.runtime.device import interprets_triton
from megatron_vlm.runtime.logging import get_logger

F = TypeVar("F", bound=Callable[..., Any])
Obstacle = Callable[..., str | None]

AUTO = "auto"
TRITON = "triton"


def no_obstacle(*inputs: Any) -> str | None:
    """The obstacle function of a backend that always runs."""
    return None


@cache
def _triton_device() -> str | None:
    """The kind of device that our kernels run on, which a process does not change; None without triton. Asked by every
    layer of every step."""
    if importlib.util.find_spec("triton") is None:
        return None
    return "cpu" if interprets_triton() else "cuda"


def triton_obstacle(*tensors: Any) -> str | None:
    """Reason why our Triton kernels cannot run on these tensors; anything with a `device` counts as one."""
    needed = _triton_device()
    if needed is None:
        return "the package triton is not installed"
    for tensor in tensors:
        if tensor.device.type != needed:
            where = "Triton's interpreter needs tensors on the CPU" if needed == "cpu" else "it needs a CUDA device"
            return f"{where}, found {tensor.device}"
    return None


TRITON_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")


def triton_layer_obstacle(*tensors: Any) -> str | None:
    """Same as `triton_obstacle`, for kernels that compute in fp32 on tensors of one dtype, which is no wider."""
    reason = triton_obstacle(*tensors)
    if reason is not None:
        return reason
    dtypes = {str(tensor.dtype): None for tensor in tensors}
    if len(dtypes) > 1:
        return f"it needs one dtype, found {' and '.join(dtypes)}"
    for dtype in dtypes:
        if dtype not in TRITON_DTYPES:
            return f"it computes in fp32 and needs one of {', '.join(TRITON_DTYPES)}, found {dtype}"
    return None


def interpreter_objection(*tensors: Any) -> str | None:
    """Reason why `auto` passes over kernels in Triton's interpreter: it is a thousand times too slow."""
    return "Triton's interpreter is for tests" if _triton_device() == "cpu" else None


@dataclass(frozen=True)
class Backend(Generic[F]):
    """One implementation; `obstacle(*inputs)` is the reason it cannot run on them, or None.

    `objection(*inputs)`, asked where nothing hinders it, is the reason `auto` should pass it over, or None.
    """

    name: str
    function: F
    obstacle: Obstacle
    objection: Obstacle = no_obstacle

    def unfit(self, *inputs: Any) -> str | None:
        """Reason why `auto` does not take it, or None."""
        return self.obstacle(*inputs) or self.objection(*inputs)


class Operation(Generic[F]):
    """The backends of one operation, fastest first.

    Args:
        key: the configuration key that selects the backend ("ops.attention"), for messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.registry: Registry[Backend[F]] = Registry(f"{key} backend")
        self._order: list[Backend[F]] = []
        self._announced: set[str] = set()

    def backend(
        self, name: str, obstacle: Obstacle = no_obstacle, objection: Obstacle = no_obstacle, package: str | None = None
    ) -> Callable[[F], F]:
        """Decorator that registers an implementation; the first registered is the first choice of `auto`.

        `package`: what pip must have installed for it; for our kernels that is triton.
        """
        needed = TRITON if name == TRITON else package

        def store(function: F) -> F:
            self._order.append(self.registry.register(name, needed)(Backend(name, function, obstacle, objection)))
            return function

        return store

    @property
    def backends(self) -> tuple[Backend[F], ...]:
        """All of them, in the order in which `auto` asks them."""
        return tuple(self._order)

    def select(self, requested: str, *inputs: Any) -> F:
        """The function that computes the operation on these inputs.

        Args:
            requested: a backend's name, or "auto".
            inputs: what the obstacle functions look at (shapes, devices, dtypes).

        Raises:
            ConfigError: an unknown name, or a backend that cannot run on these inputs, with the reason.
        """
        backend = self.find(requested, *inputs)
        if requested == AUTO and backend.name not in self._announced:
            self._announced.add(backend.name)
            get_logger(__name__).info("%s: auto took %r", self.key, backend.name)
        return backend.function

    def find(self, requested: str, *inputs: Any) -> Backend[F]:
        """The backend whose function `select` gives; nothing is said. Raises as it does."""
        if requested == AUTO:
            return self._first_able(*inputs)
        backend = self.registry.get(requested)
        reason = backend.obstacle(*inputs)
        if reason is not None:
            raise ConfigError(f"{self.key}: {requested!r} cannot run: {reason}; use {AUTO!r} or another backend")
        return backend

    def _first_able(self, *inputs: Any) -> Backend[F]:
        reasons = []
        for backend in self._order:
            reason = backend.unfit(*inputs)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise ConfigError(f"{self.key}: no backend can run ({'; '.join(reasons)})")
