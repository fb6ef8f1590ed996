"""A rank that fails ends the whole job within 30 seconds, and the job says once why.

The ranks talk over the job's store, beside the process group, because a rank that waits in a collective hears nothing
else. A failing rank puts a report there. The first one to report collects the others' for a moment, then names the
speaker: the lowest rank where the first real failure is the user's to fix (all ranks usually find the same one), else
the rank that failed first. The speaker writes to stderr; then every rank ends, those that did not fail by their watcher
thread. Nobody ends before that: torchrun kills the other ranks as soon as one is gone, and the speaker with them.

An error that only says another rank is gone (a broken connection, a collective's timeout) is an echo: it never
speaks where there is a real failure, and reports wait longer for one when they have seen nothing but echoes. Then the
speaker names the ranks that have not reported: killed, stopped or hung, and where they stood (roll_call.py).

The hazard: the watcher ends the process with `os._exit`. No clean-up runs; hence checkpoints are published by a rename.
A store whose host is stopped takes connections and never answers; hence a report has a time limit of its own.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NoReturn

from megatron_vlm.errors import MegatronVlmError, SeveralFaults, one_line, shown
from megatron_vlm.runtime import device
from megatron_vlm.runtime.launch import Launch, connect_store, hosts_store, job_keys, leave_word, store_is_there
from megatron_vlm.runtime.logging import quiet_libraries
from megatron_vlm.runtime.pipes import reader_is_gone
from megatron_vlm.runtime.roll_call import ROLL_CALL, Publisher, all_are_stopped_or_gone, end_silent, tell_of, where_was

if TYPE_CHECKING:
    from torch.distributed import Store

Kind = Literal["user", "internal", "echo"]

STORE = "failure"  # the name of its keys
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
IMPORT_SECONDS = 60.0
REPORT_SECONDS = REAL_FAILURE_SECONDS + 2 * SPEAKING_SECONDS + 3.0  # at most, of a failing rank
_TIMEOUT = re.compile(r"time[d ]*out", re.IGNORECASE)


@contextmanager
def fail_together(launch: Launch, debug: bool = False) -> Iterator[None]:
    """Every tool's main part runs inside. Ends this process, and the other ranks, when the part raises.

    Args:
        launch: this rank's place.
        debug: tracebacks for the user's errors too, and library warnings on.

    Raises:
        SystemExit: with code 1, where the job has one process; with several the process ends at once. One that is
            raised inside keeps its meaning.
    """
    if not debug:
        quiet_libraries()
    watcher = _Watcher(launch)
    if launch.world_size > 1:
        device.when_prepared(watcher.start)  # torch is imported then, by the main thread, after CUDA was hidden
    try:
        yield
    except KeyboardInterrupt:
        _end(launch, 130)
    except (SystemExit, GeneratorExit):
        raise
    except BrokenPipeError as error:
        if launch.world_size == 1 and reader_is_gone():
            raise  # `one_voice` ends without a word
        _tell(launch, error, debug)
    except BaseException as error:  # libraries raise their own beside Exception: tokenizers' panic, torch's checkpoints
        _tell(launch, error, debug)
    finally:
        watcher.stop()


def _tell(launch: Launch, error: BaseException, debug: bool) -> NoReturn:
    """Says why this process fails, on several ranks once for all of them, and ends it."""
    message = describe(error, launch, debug)
    if launch.world_size == 1:
        _say(message)
    else:
        _report(launch, kind_of(error), message)
    _end(launch, 1)


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
    """Text that the speaker writes: one line, or one for each of several faults; a traceback for our own errors and for
    debugging."""
    kind = kind_of(error)
    line = one_line(error)
    if kind == "user" and not debug:
        if _is_out_of_memory(error):
            told = ". ".join(line.split(". ")[:2])  # torch goes on at length
            return f"error: rank {launch.rank} is out of memory ({told}){_NEEDS_LESS_MEMORY}"
        if isinstance(error, SeveralFaults):
            return "\n".join(f"error: {shown(' '.join(fault.split()))}" for fault in error.faults)
        return f"error: {line}"
    if kind == "echo" and not debug:
        if is_timeout(line):
            return f"error: rank {launch.rank} has waited in vain for another rank (stopped, or hung?): {line}"
        return f"error: rank {launch.rank} lost another rank, which ended without a word (killed?): {line}"
    return f"rank {launch.rank} failed:\n{shown(''.join(traceback.format_exception(error)).rstrip())}"


def is_timeout(message: str) -> bool:
    """Whether gloo, NCCL or a store says so that the others did not come."""
    return _TIMEOUT.search(message) is not None


def _is_out_of_memory(error: BaseException) -> bool:
    """GPU's or host's. torch has an own class for the first alone, a RuntimeError as the second's."""
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return told or isinstance(error, MemoryError)


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    leave_word(message)


def _end(launch: Launch, code: int) -> NoReturn:
    """Ends this process; one of several without clean-up, which could wait for ranks that are gone."""
    if launch.world_size == 1:
        raise SystemExit(code)
    sys.stdout.flush()
    os._exit(code)


def _report(launch: Launch, kind: Kind, message: str) -> None:
    """Tells the other ranks of this one's failure and speaks if chosen. Returns when this process may end."""

    def alone(why: str) -> None:  # better two voices than none
        _say(message if kind == "user" else f"{message}\n(rank {launch.rank} could not reach the other ranks: {why})")

    def talk() -> None:
        try:
            _talk(launch, kind, message)
        except Exception as error:  # the store's host is gone or never was
            alone(one_line(error))

    thread = threading.Thread(target=talk, name="failure-report", daemon=True)
    thread.start()
    thread.join(REPORT_SECONDS)
    if thread.is_alive():
        alone("their store does not answer; is its host, the launcher or rank 0, stopped?")


def _talk(launch: Launch, kind: Kind, message: str) -> None:
    store = connect_store(launch, STORE, STORE_SECONDS)
    store.set(f"report/{launch.rank}", json.dumps(kind))
    order = store.add("failed", 1)
    store.set(f"order/{order}", str(launch.rank))
    if order == 1:
        store.set(ROLL_CALL, "1")
        store.set("speaker", str(_choose_speaker(store, launch.world_size)))
    limit_seconds = REAL_FAILURE_SECONDS + SPEAKING_SECONDS
    if not _appears(store, "speaker", limit_seconds) or store.get("speaker") == str(launch.rank).encode():
        missing = _missing(store, launch.world_size) if kind == "echo" else []
        _say(tell_of(store, missing, message, is_timeout(message)) if kind == "echo" else message)
        end_silent(store, missing)  # first: once it is spoken this process may be ended, by its own watcher, too
        store.set("spoken", "1")
    _appears(store, "spoken", SPEAKING_SECONDS)
    if hosts_store(launch):
        time.sleep(2 * POLL_SECONDS)  # for the others to see that it is spoken: the store ends with this process


def end_others(launch: Launch, code: int) -> None:
    """Ends the other ranks without a word: this one was told to end, and they would wait for it. Returns soon, whatever
    becomes of it; where this process is still importing torch, when it has."""
    if launch.world_size == 1:
        return
    deadline = time.monotonic() + IMPORT_SECONDS
    while not device.is_prepared() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 5)

    def tell() -> None:
        with contextlib.suppress(Exception):  # the store's host may have ended already
            _end_all(connect_store(launch, STORE, STORE_SECONDS), str(launch.rank), code)

    if device.is_prepared():
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(SPEAKING_SECONDS)
        if hosts_store(launch):
            time.sleep(2 * POLL_SECONDS)


def speak_for(store: "Store", rank: int, what: str) -> None:
    """Says, for a launcher that hosts the job's store, what became of a rank, and where; then all other ranks end.

    Args:
        store: without a prefix.
        what: completes "rank N ...".
    """
    keys = job_keys(store, STORE)
    if not keys.check(["speaker"]):
        _say(f"error: {where_was(keys, rank, what)}")
    _end_all(keys, "launcher", 1)


def _end_all(store: "Store", speaker: str, code: int) -> None:
    """Every rank ends with the code; nobody speaks any more."""
    for key, value in (("code", str(code)), ("spoken", "1"), ("speaker", speaker), (ROLL_CALL, "1")):
        store.set(key, value)


def _appears(store: "Store", key: str, limit_seconds: float) -> bool:
    """Waits for a key. (`Store.wait` would log a C++ stack trace at its timeout.)"""
    deadline = time.monotonic() + limit_seconds
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS / 5)
    return True


def _choose_speaker(store: "Store", world_size: int) -> int:
    """Collects reports until all ranks have failed, or can not, or the time is over, then applies the rule above."""
    started = time.monotonic()
    while True:
        reports = _read_reports(store)
        real = any(kind != "echo" for kind in reports.values())
        seconds = time.monotonic() - started
        no_more = len(reports) == world_size or seconds > (REPORTS_SECONDS if real else REAL_FAILURE_SECONDS)
        if not no_more and seconds > REPORTS_SECONDS:
            no_more = all_are_stopped_or_gone(store, _missing(store, world_size))
        if no_more:
            return choose_speaker(reports)
        time.sleep(POLL_SECONDS / 5)


def _missing(store: "Store", world_size: int) -> list[int]:
    """Ranks that have not reported."""
    reported = _read_reports(store)
    return [rank for rank in range(world_size) if rank not in reported]


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

    def start(self) -> None:
        """Starts, unless this rank is through."""
        if not self.job_is_done.is_set():
            super().start()

    def run(self) -> None:
        """Polls on an own connection: a store's connection serves one caller at a time, and the main one may wait."""
        import torch.distributed as dist

        code = 1
        if (store := self._connected()) is None:
            return
        try:
            publisher = Publisher(store, self.launch.rank)
            while not store.check([ROLL_CALL]):
                publisher.poll()
                if self.job_is_done.wait(POLL_SECONDS):
                    return
            publisher.answer()
            while not store.check(["speaker"]):
                if self.job_is_done.wait(POLL_SECONDS):
                    return
            _appears(store, "spoken", SPEAKING_SECONDS)
            code = int(store.get("code")) if store.check(["code"]) else 1
        except dist.DistError:
            if self.job_is_done.wait(STORE_SECONDS):  # a job that ends well takes its store along
                return
            _say(f"error: rank {self.launch.rank} lost the job's store: its host, launcher or rank 0, is gone")
        if not self.job_is_done.is_set():
            _end(self.launch, code)

    def _connected(self) -> "Store | None":
        """The store, once it is there; None where the rank is through before. The main thread, which waits for it too,
        knows how long to wait, and says it where nobody comes."""
        import torch.distributed as dist

        while True:
            if store_is_there(self.launch):  # torch would log that it is not
                with contextlib.suppress(dist.DistError):
                    return connect_store(self.launch, STORE, STORE_SECONDS)
            if self.job_is_done.wait(POLL_SECONDS):
                return None
