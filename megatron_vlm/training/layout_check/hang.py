"""Noticing that the ranks wait for each other for ever, and where.

A rank that stays out of a collective leaves the others inside it, where no timeout of ours reaches: so each rank works
in a thread of its own, and its main thread watches. Who gives no sign of life for too long says so in the job's store;
then every rank writes there where it stands, read off its worker's stack, and all of them tell the same story.

Hazard: the worker thread cannot be ended. After a hang the process must end, and without waiting for the groups.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Generic, NamedTuple, TypeVar

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import schedules
from torch.distributed import Store

from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import current_device
from megatron_vlm.training.job import build_job
from megatron_vlm.training.step import TrainStep

T = TypeVar("T")
POLL_SECONDS = 0.1
STORY_SECONDS = 10.0  # for the other ranks to notice and to write where they stand
LIBRARY = "torch"  # whose frames are not shown: the one that called it tells more

PHASES: dict[str, Callable] = {  # what runs in each phase, in the order of a step
    "build": build_job,
    "vision encode": TrainStep._encode,
    "exchange": VisionLanguageModel.exchange,
    "language forward": TrainStep._run_pipeline,
    "language backward": schedules.backward_step,
    "vision backward": TrainStep._backward_media,
    "gradient reduction": TrainStep._finalize,
    "optimizer": ChainedOptimizer.step,
}
PHASE_OF: dict[CodeType, str] = {unwrap(function).__code__: phase for phase, function in PHASES.items()}


@dataclass(frozen=True)
class Place:
    """Position of a rank: steps made, phase, and the function with its file and line."""

    rank: int
    steps: int
    phase: str
    function: str


class Hang(NamedTuple):
    """Positions of all ranks when none went on."""

    places: tuple[Place, ...]

    @property
    def first(self) -> Place:
        """The one that is least far: what it waits in, the others have left out or not come to."""
        order = list(PHASES)
        return min(self.places, key=lambda p: (p.steps, order.index(p.phase) if p.phase in order else len(order)))

    def __str__(self) -> str:
        first = self.first
        there = [place for place in self.places if (place.steps, place.phase) == (first.steps, first.phase)]
        others = [f"rank {p.rank} is in {p.phase} ({p.function})" for p in self.places if p not in there]
        waiting = f"rank{'s' if len(there) > 1 else ''} {', '.join(str(place.rank) for place in there)}"
        story = "; ".join([f"{waiting} there ({first.function})", *others])
        return f"step {first.steps + 1} hangs in {first.phase}: {story}"


class Worker(threading.Thread, Generic[T]):
    """Runs `work` with a function to be called at every sign of life."""

    def __init__(self, work: Callable[[Callable[[int], None]], T]) -> None:
        super().__init__(name="layout-check", daemon=True)
        self.work = work
        self.steps = 0
        self.last_sign = time.monotonic()
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """The work, on the device of the thread that made this one."""
        try:
            self.result = self.work(self.give_sign)
        except BaseException as error:  # raised again by the main thread
            self.error = error

    def give_sign(self, steps: int) -> None:
        """`steps` are made."""
        self.steps, self.last_sign = steps, time.monotonic()

    def place(self, rank: int) -> Place:
        """Position of this thread now."""
        frame = sys._current_frames().get(self.ident or 0)
        phase, function = read_stack(frame) if frame is not None else ("end", "waiting for the others")
        return Place(rank, self.steps, phase, function)


def read_stack(innermost: FrameType | None) -> tuple[str, str]:
    """(phase, function) of a stack: the innermost function that names a phase, and the innermost outside torch."""
    phase, function = "", ""
    frame = innermost
    while frame is not None and not phase:
        module = frame.f_globals.get("__name__", "")
        if not function and module.partition(".")[0] not in (LIBRARY, "threading"):
            function = f"{frame.f_code.co_qualname}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        phase = PHASE_OF.get(frame.f_code, "")
        frame = frame.f_back
    return phase or "between phases", function


def run_watched(
    work: Callable[[Callable[[int], None]], T], store: Store, rank: int, num_ranks: int, limit_seconds: float
) -> T | Hang:
    """Runs `work` on every rank at a time; what it returned, or a `Hang` on all of them.

    Args:
        work: is given a function to be told the number of steps made; called at least every `limit_seconds`.
        store: of this check alone, on a connection of this thread alone.
    """
    device = current_device()

    def on_device(give_sign: Callable[[int], None]) -> T:
        if device.type == "cuda":  # a thread's own setting
            torch.cuda.set_device(device)
        return work(give_sign)

    worker = Worker(on_device)
    worker.start()
    told = False
    while True:
        worker.join(POLL_SECONDS)
        if worker.error is not None:
            raise worker.error
        if not worker.is_alive() and not told:
            store.add("finished", 1)
            told = True
        if told and store.add("finished", 0) == num_ranks:
            assert worker.result is not None
            return worker.result
        if worker.is_alive() and time.monotonic() - worker.last_sign > limit_seconds:
            store.set("hangs", "1")
        if store.check(["hangs"]):
            return _tell(worker.place(rank), store, num_ranks)


def _tell(place: Place, store: Store, num_ranks: int) -> Hang:
    """Writes this rank's place and reads all of them."""
    store.set(f"place/{place.rank}", json.dumps(asdict(place)))
    keys = [f"place/{rank}" for rank in range(num_ranks)]
    deadline = time.monotonic() + STORY_SECONDS
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return Hang(tuple(Place(**json.loads(store.get(key))) for key in keys if store.check([key])))
