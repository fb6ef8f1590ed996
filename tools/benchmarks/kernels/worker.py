"""A process in which a kernel benchmark measures one operation after the other, and tells each number as it has it.

A kernel that writes where it must not spoils its process for good (every later call fails with "CUDA error"), one that
waits forever its run. Here either costs its own operation only: the next one has a new process.
"""

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .case import Case
    from .timing import Bench

END = "end"
Message = tuple[str, Any]  # "cells" a cell, "others" (place, reason), "failures" a place, END whether it is spoilt


@dataclass(frozen=True)
class Settings:
    """The command line's, as the measuring process needs it."""

    device: str
    rounds: int
    tiny: bool
    compiles: str  # first | all | none
    sides: tuple[str, ...] | None


class Worker:
    """Measures operations in a process of its own, made anew where the last one is no good."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: Any = None
        self._connection: Connection | None = None

    def measure(self, op: str, seconds: float) -> Iterator[Message]:
        """Yields an operation's results as they come; "others" and "failures" where it was not done in `seconds`."""
        deadline = time.monotonic() + seconds
        connection = self._connection or self._start()
        connection.send(op)
        while True:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                yield from self._lost(op, f"not done after {seconds:.0f} s")
                return
            try:
                name, value = connection.recv()
            except EOFError:
                self._process.join()
                yield from self._lost(op, f"its process has ended with code {self._process.exitcode}")
                return
            if name == END:
                if value:
                    self.stop()
                return
            yield name, value

    def _lost(self, op: str, reason: str) -> Iterator[Message]:
        self.stop()
        yield "others", (op, f"failed: {reason}")
        yield "failures", op

    def _start(self) -> Connection:
        spawning = multiprocessing.get_context("spawn")
        self._connection, there = spawning.Pipe()
        self._process = spawning.Process(target=serve, args=(self._settings, there), daemon=True)
        self._process.start()
        there.close()
        return self._connection

    def stop(self) -> None:
        """Ends the process, by force."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._connection = None


CEILINGS = "ceilings"


def serve(settings: Settings, connection: Connection) -> None:
    """The process's main function: measures what it is told, an operation or the ceilings, until its parent ends it."""
    from megatron_vlm.runtime.device import prepare

    device = prepare("cuda" if settings.device == "cuda" else "cpu")
    import torch

    from .cases import CASES
    from .timing import Bench, ceilings

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(device, dtype, settings.rounds, settings.tiny)
    cases = {case.op: case for case in CASES}
    while True:
        try:
            op = connection.recv()
        except EOFError:
            return
        if op == CEILINGS:
            connection.send((CEILINGS, ceilings(bench)))
        else:
            for message in measure_case(bench, cases[op], settings):
                connection.send(message)
        connection.send((END, _is_spoilt(device)))


def measure_case(bench: "Bench", case: "Case", settings: Settings) -> Iterator[Message]:
    """The operation's cells, and the reasons of the sides that have none."""
    from .results import words
    from .timing import COMPILED, errors, is_ours, reason_of, side_names, sides_of, times

    wanted = [name for name in side_names(case) if settings.sides is None or name in settings.sides]
    sizes = case.tiny if settings.tiny else case.sizes
    found: dict[str, dict[str, Any]] = {}
    for number, of_size in enumerate(sizes):
        compiles = settings.compiles == "all" or (settings.compiles == "first" and number == 0)
        sides = sides_of(case, [name for name in wanted if name != COMPILED or compiles])
        cells, reasons = times(bench, case, of_size, sides)
        if number == 0:
            try:
                found, unmeasured = errors(bench, case, sides)
            except Exception as error:  # the twin's: the times are worth something without it
                unmeasured = {"the twin": reason_of(error)}
            reasons = unmeasured | reasons
        for side, cell in cells.items():
            yield "cells", {"op": case.op, "sizes": dict(of_size), "side": side, **cell, **found.get(side, {})}
        for side, reason in reasons.items():
            place = f"{case.op}, {side}" if reason.startswith("not run") else f"{case.op} {words(of_size)}, {side}"
            yield "others", (place, reason)
            if is_ours(case, side) and reason.startswith("failed"):
                yield "failures", place


def _is_spoilt(device: Any) -> bool:
    """Whether nothing can run on the device any more, from this process."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
