"""Work for data workers: squares, each with the process that computed it."""

import os
import signal
import sys
from dataclasses import dataclass

import torch

from megatron_vlm.errors import DataError


class Panic(BaseException):
    """As pyo3 has it, which is no Exception."""


@dataclass(frozen=True)
class Squares:
    """Squares of numbers, except for those that end the worker in some way."""

    bad: int = -1
    broken: int = -1
    killed: int = -1
    panicking: int = -1
    leaving: int = -1

    def produce(self, number: int) -> tuple[int, torch.Tensor, int]:
        if number == self.bad:
            raise DataError(f"item {number} is bad")
        if number == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.broken:
            raise KeyError("a bug")
        if number == self.panicking:
            raise Panic("called `Option::unwrap()`")
        if number == self.leaving:
            sys.exit(0)
        return number, torch.full((2,), number * number), os.getpid()
