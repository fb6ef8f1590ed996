"""A rank that fails ends the whole job within 30 seconds, and the job says once why.

The ranks talk over the job's store, beside the process group, because a rank that waits in a collective hears nothing
else. A failing rank puts a report there. The first one to report collects the others' for a moment, then names the
speaker: the lowest rank where the first real failure is the user's to fix (all ranks usually find the same one), else
the rank that failed first. The speaker writes to stderr; then every rank ends, those that did not fail by their watcher
thread. Nobody ends before that: torchrun kills the other ranks as soon as one is gone, and the speaker with them.

An error that only says another rank is gone (a broken connection, a collective's timeout) is an echo: it never
speaks where there is a real failure, and reports wait longer for one when they have seen nothing but echoes. A rank
killed from outside leaves no report; torchrun names it, and if the others live to notice, the echo is told in a line.

The hazard: the watcher ends the process with `os._exit`. No clean-up runs; hence checkpoints are published by a rename.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NoReturn

from megatron_vlm.errors import MegatronVlmError, one_line, shown
from megatron_vlm.runtime import device
from megatron_vlm.runtime.launch import Launch, connect_store
from megatron_vlm.runtime.logging import quiet_libraries

if TYPE_CHECKING:
    from torch.distributed import Store

Kind = Literal["user", "internal", "echo"]

POLL_SECONDS = 0.5
REPORTS_SECONDS = 3.0  # other ranks that find the same error may be this much later
REAL_FAILURE_SECONDS = 12.0  # only echoes so far: the rank they come from may still be about to report
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
_NEEDS_LESS_MEMORY = (
    "; needs a smaller training.micro_batch_size, training.sequence_length, training.media_window or "
    "training.media_batch, training.recompute, or more ranks to share the model"
)
SPEAKING_SECONDS = 5.0  # from the decision until everyone ends, at most
STORE_SECONDS = 10.0


@contextmanager
def fail_together(launch: Launch, debug: bool = False) -> Iterator[None]:
    """Every tool's main part runs inside. Ends this process, and the other ranks, when the part raises.

    Args:
        launch: this rank's place.
        debug: tracebacks for the user's errors too, and library warnings on.

    Raises:
        SystemExit: with code 1, where the job has one process; with several the process ends at once.
    """
    if not debug:
        quiet_libraries()
    watcher = _Watcher(launch)
    if launch.world_size > 1:
        watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        _end(launch, 130)
    except Exception as error:
        message = describe(error, launch, debug)
        if launch.world_size == 1:
            _say(message)
        else:
            _report(launch, kind_of(error), message)
        _end(launch, 1)
    finally:
        watcher.stop()


def kind_of(error: BaseException) -> Kind:
    """Whether an exception is the user's to fix, ours, or the echo of another rank's end."""
    if isinstance(error, MegatronVlmError) or _is_out_of_memory(error):
        return "user"
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return "echo"
    names_backend = any(name in str(error) for name in ("gloo", "NCCL", "ncclRemoteError"))
    return "echo" if isinstance(error, RuntimeError) and names_backend else "internal"


def describe(error: BaseException, launch: Launch, debug: bool) -> str:
    """What the speaker writes: one line, or a traceback for our own errors and for debugging."""
    kind = kind_of(error)
    line = one_line(error)
    if kind == "user" and not debug:
        if _is_out_of_memory(error):
            told = ". ".join(line.split(". ")[:2])  # torch goes on at length
            return f"error: rank {launch.rank} is out of memory ({told}){_NEEDS_LESS_MEMORY}"
        return f"error: {line}"
    if kind == "echo" and not debug:
        return f"error: rank {launch.rank} lost another rank, which ended without a word (killed?): {line}"
    return f"rank {launch.rank} failed:\n{shown(''.join(traceback.format_exception(error)).rstrip())}"


def _is_out_of_memory(error: BaseException) -> bool:
    """GPU's or host's. torch has an own class for the first alone, a RuntimeError as the second's."""
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return told or isinstance(error, MemoryError)


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def _end(launch: Launch, code: int) -> NoReturn:
    """Ends this process; one of several without clean-up, which could wait for ranks that are gone."""
    if launch.world_size == 1:
        raise SystemExit(code)
    sys.stdout.flush()
    os._exit(code)


def _report(launch: Launch, kind: Kind, message: str) -> None:
    """Tells the other ranks of this one's failure and speaks if chosen. Returns when this process may end."""
    import torch.distributed as dist

    try:
        store = connect_store(launch, "failure", STORE_SECONDS)
        store.set(f"report/{launch.rank}", json.dumps(kind))
        order = store.add("failed", 1)
        store.set(f"order/{order}", str(launch.rank))
        if order == 1:
            store.set("speaker", str(_choose_speaker(store, launch.world_size)))
        limit_seconds = REAL_FAILURE_SECONDS + SPEAKING_SECONDS
        if not _appears(store, "speaker", limit_seconds) or store.get("speaker") == str(launch.rank).encode():
            _say(message)
            store.set("spoken", "1")
        _appears(store, "spoken", SPEAKING_SECONDS)
    except dist.DistError as error:  # the store's host is gone or never was: better two voices than none
        alone = f"\n(rank {launch.rank} could not reach the other ranks: {one_line(error)})"
        _say(message if kind == "user" else message + alone)


def _appears(store: "Store", key: str, limit_seconds: float) -> bool:
    """Waits for a key. (`Store.wait` would log a C++ stack trace at its timeout.)"""
    deadline = time.monotonic() + limit_seconds
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS / 5)
    return True


def _choose_speaker(store: "Store", world_size: int) -> int:
    """Collects reports until all ranks have failed or the time for it is over, then applies the rule above."""
    started = time.monotonic()
    while True:
        reports = _read_reports(store)
        real = any(kind != "echo" for kind in reports.values())
        if len(reports) == world_size or time.monotonic() - started > (
            REPORTS_SECONDS if real else REAL_FAILURE_SECONDS
        ):
            return choose_speaker(reports)
        time.sleep(POLL_SECONDS / 5)


def choose_speaker(reports: dict[int, Kind]) -> int:
    """The rank that speaks, given every failed rank's kind of failure in the order of reporting."""
    real = {rank: kind for rank, kind in reports.items() if kind != "echo"}
    if not real:
        return min(reports)
    first = next(iter(real))
    return min(rank for rank, kind in real.items() if kind == "user") if real[first] == "user" else first


def _read_reports(store: "Store") -> dict[int, Kind]:
    """Reports so far, by rank, first come first."""
    reports: dict[int, Kind] = {}
    for order in range(1, store.add("failed", 0) + 1):
        if store.check([f"order/{order}"]):
            rank = int(store.get(f"order/{order}"))
            reports[rank] = json.loads(store.get(f"report/{rank}"))
    return reports


class _Watcher(threading.Thread):
    """Ends this process once the job has failed elsewhere and its speaker has spoken."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(name="failure-watcher", daemon=True)
        self.launch = launch
        self.job_is_done = threading.Event()

    def stop(self) -> None:
        """This rank is through, or has taken its failure into its own hands."""
        self.job_is_done.set()

    def run(self) -> None:
        """Polls on an own connection: a store's connection serves one caller at a time, and the main one may wait."""
        while (
            not device.is_prepared()
        ):  # torch is imported by the main thread, after CUDA was hidden, never by this one
            if self.job_is_done.wait(POLL_SECONDS):
                return
        import torch.distributed as dist

        try:
            store = connect_store(self.launch, "failure", STORE_SECONDS)
            while not store.check(["speaker"]):
                if self.job_is_done.wait(POLL_SECONDS):
                    return
            _appears(store, "spoken", SPEAKING_SECONDS)
        except dist.DistError:
            if self.job_is_done.wait(STORE_SECONDS):  # a job that ends well takes its store along
                return
            _say(f"error: rank {self.launch.rank} lost the job's store: its host, launcher or rank 0, is gone")
        if not self.job_is_done.is_set():
            _end(self.launch, 1)
