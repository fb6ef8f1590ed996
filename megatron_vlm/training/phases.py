"""Time of a step by phase on this rank, and its position (runtime/position.py). Only in `encode` it waits for no other.

Hazard: work on a GPU is queued, and a phase that only queues it looks free. So where the times are to be compared the
device is waited for at the end of every phase, which costs a little of the overlap; elsewhere it is not.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.position import HERE

PHASES = ("encode", "exchange", "pipeline", "encoder_backward", "update")


class PhaseClock:
    """Seconds by phase.

    Args:
        exact: wait for the device at the end of each phase.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the phase."""
        started = time.perf_counter()
        HERE.phase(name)
        yield
        if self.exact and current_device().type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - started
