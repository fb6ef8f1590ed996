"""Parts of a checkpoint whose writer misbehaves. They go to the writer's process by name, so they stand in a module."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_vlm.checkpoint import writing
from megatron_vlm.checkpoint.writing import Outcome, Part

NUM_WRITTEN = 20  # tensors, before the rank is killed
SLOW_SECONDS = 0.5


def gate_of(directory: Path) -> Path:
    """The file that `GatedPart` waits for, beside its directory."""
    return directory.with_name("gate")


class GatedPart(Part):
    """Is written when the gate is open."""

    def write(self) -> Outcome:
        while not gate_of(self.directory).exists():
            time.sleep(0.005)
        return super().write()


class SlowPart(Part):
    """Takes its time."""

    def write(self) -> Outcome:
        time.sleep(SLOW_SECONDS)
        return super().write()


class RefusedPart(Part):
    """Meets a limit of the disk after some tensors."""

    def write(self) -> Outcome:
        with mock.patch.object(writing, "_write_item", after(NUM_WRITTEN, refuse)):
            return super().write()


class FatalPart(Part):
    """Kills its rank after some tensors, and waits to be ended."""

    def write(self) -> Outcome:
        with mock.patch.object(writing, "_write_item", after(NUM_WRITTEN, kill_the_rank)):
            return super().write()


class EndedPart(Part):
    """Its writer ends by SIGKILL after some tensors."""

    def write(self) -> Outcome:
        with mock.patch.object(writing, "_write_item", after(NUM_WRITTEN, end_the_writer)):
            return super().write()


def after(count: int, action: Any) -> Any:
    """The function that writes one tensor, which does something else from the `count`th on."""
    write_item, written = writing._write_item, 0

    def write(transforms: Any, stream: Any, *arguments: Any) -> Any:
        nonlocal written
        written += 1
        if written > count:
            stream.flush()
            action()
        return write_item(transforms, stream, *arguments)

    return write


def refuse() -> None:
    raise OSError(28, "No space left on device")


def end_the_writer() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None and rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    signal.pause()
