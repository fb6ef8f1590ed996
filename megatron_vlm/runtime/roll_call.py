"""Roll call of the ranks: finds the one that is stopped, hung or gone when the others only lost somebody.

    sign/RANK      where a rank stands, by its watcher: at the start, and again where it has moved on, now and then
    roll_call      set by the first rank to fail
    answer/RANK    the same once more, with the line that the main thread is in, by every watcher that still runs

Ranks without a report are those that the others wait for. One that answers hangs; one that does not is stopped, or its
process or machine is gone. What the kernel says of a process is asked where it is on the asking rank's machine, and its
record is read there, which is as new as can be (position.py).

Hazard: a rank may be late to find out that it waits in vain. So a rank whose main thread is inside torch.distributed is
named only where there is no other.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_vlm.runtime.position import HERE, Place, read_record

if TYPE_CHECKING:
    from torch.distributed import Store

PUBLISH_SECONDS = 2.0  # at least, between two signs: a thousand ranks cost their store some hundred a second
MAX_NAMED = 4
MAX_ASKED_AFTER = 64  # ranks whose processes are looked at
ROLL_CALL = "roll_call"


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life. `handle`: of its record; `frame`: what its main thread is in, `waits`: for other ranks."""

    machine: str
    pid: int
    handle: int
    place: Place
    frame: str = ""
    waits: bool = False

    @classmethod
    def of_this_process(cls, with_frame: bool = False) -> "Sign":
        """The sign of this process, now."""
        frame, waits = main_thread_frame() if with_frame else ("", False)
        return cls(_machine(), os.getpid(), HERE.record.handle, HERE.place, frame, waits)

    @classmethod
    def read(cls, text: bytes) -> "Sign":
        """Parses a sign that `str` made."""
        values = json.loads(text)
        return cls(**{**values, "place": Place(**values["place"])})

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @property
    def record(self) -> Place | None:
        """The position in its record, where that can be read."""
        return read_record(self.pid, self.handle) if self.machine == _machine() else None

    @property
    def newest_place(self) -> Place:
        """Its record's, where that can be read."""
        return self.record or self.place

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended."""
        return self.state in "ZX"

    @property
    def state(self) -> str:
        """The kernel's letter for the process, Z where it is gone, ? where it is on another machine."""
        if self.machine != _machine():
            return "?"
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "Z"


class Publisher:
    """Keeps a rank's sign in the store up to date."""

    def __init__(self, store: "Store", rank: int) -> None:
        self._store, self._rank = store, rank
        self._told, self._next = Place(), 0.0

    def poll(self) -> None:
        """Looks for a call; called now and then."""
        if HERE.place != self._told and time.monotonic() >= self._next:
            sign = Sign.of_this_process()
            self._store.set(f"sign/{self._rank}", str(sign))
            self._told, self._next = sign.place, time.monotonic() + PUBLISH_SECONDS

    def answer(self) -> None:
        """Answers the roll call."""
        self._store.set(f"answer/{self._rank}", str(Sign.of_this_process(with_frame=True)))


def main_thread_frame() -> tuple[str, bool]:
    """The innermost function of the main thread outside of torch, with its file and line, and whether it waits inside
    torch.distributed."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("torch", "threading", "queue"):
            return f"{frame.f_code.co_qualname}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}", waits
        waits = waits or module.startswith("torch.distributed")
        frame = frame.f_back
    return "", waits


def all_are_stopped_or_gone(store: "Store", missing: Collection[int]) -> bool:
    """Whether the kernel says so of every one of these ranks: none of them is about to report."""
    if len(missing) > MAX_ASKED_AFTER:
        return False
    return all(_read(store, f"answer/{rank}") is None and _state_of(store, rank) in "TtZX" for rank in missing)


def tell_of(store: "Store", missing: Collection[int], message: str, in_vain: bool) -> str:
    """Text by which the speaker names ranks that have not reported.

    Args:
        missing: these ranks; none: they all say that they wait for another.
        message: what the speaker would say by itself.
        in_vain: its wait had a time limit; else its peer's end has ended it.
    """
    answers = {rank: _read(store, f"answer/{rank}") for rank in missing}
    silent = {rank: _read(store, f"sign/{rank}") for rank, sign in answers.items() if sign is None}
    gone = [rank for rank, sign in silent.items() if (sign.is_gone if sign is not None else not in_vain)]
    if gone:
        return f"{message}; {_listed([where_was(store, rank, 'is gone') for rank in gone])}"
    if silent:
        return f"error: {_listed([_silent(rank, sign) for rank, sign in silent.items()])}"
    hung = {rank: sign for rank, sign in answers.items() if sign is not None}
    hung = {rank: sign for rank, sign in hung.items() if not sign.waits} or hung
    return f"error: {_listed([_hung(rank, sign) for rank, sign in hung.items()])}" if hung else message


def end_silent(store: "Store", missing: Collection[int]) -> None:
    """Ends those of them on this machine that do not answer: they would stay, or keep their launcher waiting."""
    for rank in missing:
        sign = _read(store, f"sign/{rank}") if _read(store, f"answer/{rank}") is None else None
        if sign is not None and sign.record is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sign.pid, signal.SIGKILL)


def where_was(store: "Store", rank: int, what: str) -> str:
    """Says that a rank, which is gone, `what`, and its last position."""
    sign = _read(store, f"sign/{rank}")
    return f"rank {rank} {what}" + ("" if sign is None else f" {sign.place}")


def _silent(rank: int, sign: Sign | None) -> str:
    if sign is None:
        return f"rank {rank} has never given a sign of life"
    reasons = {"T": "stopped", "t": "stopped by a debugger", "?": "stopped or hung, or its machine is gone"}
    why = reasons.get(sign.state, "stopped, or hung")
    return f"{_for_how_long(rank, 'answered', sign.newest_place)} ({why}) {sign.newest_place}"


def _hung(rank: int, sign: Sign) -> str:
    at = f", at {sign.frame}" if sign.frame else ""
    return f"{_for_how_long(rank, 'gone on', sign.newest_place)} (hung) {sign.newest_place}{at}"


def _for_how_long(rank: int, what: str, place: Place) -> str:
    return f"rank {rank} has not {what} for {max(0.0, time.time() - place.since):.0f} s"


def _listed(lines: list[str]) -> str:
    more = len(lines) - MAX_NAMED
    return "; ".join(lines[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _state_of(store: "Store", rank: int) -> str:
    sign = _read(store, f"sign/{rank}")
    return "?" if sign is None else sign.state


def _read(store: "Store", key: str) -> Sign | None:
    return Sign.read(store.get(key)) if store.check([key]) else None


def _machine() -> str:
    """This machine since it was started, and its space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
