"""Counts the bytes of the tensors that live at a time, on any device, "meta" too."""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`num_bytes`: of the memory made inside that is alive; `peak`: the most at a time. What is given from outside does
    not count."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}  # by storage
        self.num_bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return out

    def _watch(self, storage: UntypedStorage, num_bytes: int) -> None:
        place = storage._cdata
        if place in self._alive:
            return
        self._alive[place] = num_bytes
        self.num_bytes += num_bytes
        self.peak = max(self.peak, self.num_bytes)
        weakref.finalize(storage, self._forget, place).atexit = False

    def _forget(self, place: int) -> None:
        self.num_bytes -= self._alive.pop(place)
