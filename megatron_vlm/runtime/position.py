"""The position of this process: step, phase and sample, for others to tell when it cannot.

    HERE.step(12)                the main thread, as it goes on
    HERE.phase("encode")
    HERE.sample("cat-7")         where one is worked on

A rank that hangs or was stopped says nothing, so what it last wrote must be found by others. The record lies in memory
of its own, which any process of the same user can read (`read_record`), even while this one is stopped; the failure
watcher also sends it to the job's store now and then, for ranks on other machines. A data worker writes into a record
that its rank has made (`HERE.write_to`). Writing costs about a microsecond, less than one in a thousand of the smallest
step.

The one record per process is module state, as the device is (STYLE 4): readers of files, deep in data/, have no other
way to a thread that watches the process.
"""

import copy
import mmap
import os
import struct
import time
import weakref
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

from megatron_vlm.errors import shown

_NAME = "megatron_vlm_position"
_LAYOUT = struct.Struct("<qd32s160s")  # step (0: none), time, phase, sample (empty: none), the texts cut where too long
RECORD_BYTES = _LAYOUT.size


@dataclass(frozen=True)
class Place:
    """Position of a process, and since when (`time.time()`)."""

    step: int | None = None
    phase: str = "start"
    sample: str | None = None
    since: float = 0.0

    def __str__(self) -> str:
        where = [] if self.step is None else [f"step {self.step}"]
        where.append(f"phase {self.phase}")
        where += [] if self.sample is None else [f"sample {shown(self.sample)!r}"]
        return f"in {', '.join(where)}"


class Record:
    """Memory that holds a `Place`, or several by number, sent to a child process as one handle: a fork server takes
    few of them per child."""

    def __init__(self, count: int = 1, handle: int | None = None) -> None:
        self.handle = os.memfd_create(_NAME) if handle is None else handle
        weakref.finalize(self, os.close, self.handle)
        if handle is None:
            os.truncate(self.handle, count * RECORD_BYTES)
        self._memory, self._count, self._start = mmap.mmap(self.handle, count * RECORD_BYTES), count, 0

    def number(self, number: int) -> "Record":
        """One of several, in the same memory; to be used while this one is there."""
        one = copy.copy(self)
        one._start = number * RECORD_BYTES
        return one

    def write(self, step: int, phase: str, sample: str, since: float) -> None:
        """Replaces what it holds."""
        texts = phase.encode(errors="replace"), sample.encode(errors="replace")
        _LAYOUT.pack_into(self._memory, self._start, step, since, *texts)

    def read(self) -> Place:
        """Reads a record. A writer may come in between; then a text is half of the one and half of the other."""
        step, since, *texts = _LAYOUT.unpack_from(self._memory, self._start)
        phase, sample = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        return Place(step or None, phase, sample or None, since)

    def __reduce__(self) -> tuple[Any, ...]:
        return _record_from, (self._count, DupFd(self.handle))


def _record_from(count: int, handle: Any) -> Record:
    return Record(count, handle.detach())


def read_record(pid: int, handle: int) -> Place | None:
    """The record of another process of this machine and user, by that one's handle; None where there is none."""
    path = f"/proc/{pid}/fd/{handle}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None  # the process ended, and another has its number
        other = os.open(path, os.O_RDWR)
    except OSError:
        return None
    return Record(handle=other).read()


class Position:
    """This process's place; written by its main thread."""

    def __init__(self) -> None:
        self._record: Record | None = None
        self._step, self._phase, self._sample, self._since = 0, "start", "", time.time()

    @property
    def place(self) -> Place:
        """The position now."""
        return Place(self._step or None, self._phase, self._sample or None, self._since)

    @property
    def record(self) -> Record:
        """The record that others can read."""
        if self._record is None:
            self.write_to(Record())
        assert self._record is not None
        return self._record

    def write_to(self, record: Record) -> None:
        """Uses a record that another process reads."""
        self._record = record
        self._write()

    def step(self, number: int) -> None:
        """A step begins, counted from 1."""
        self._step, self._sample = number, ""
        self._write()

    def phase(self, name: str) -> None:
        """A part of the step, or of the run, begins."""
        self._phase, self._sample = name, ""
        self._write()

    def sample(self, name: str | None) -> None:
        """Work on a sample begins; None: on none."""
        if name != (self._sample or None):
            self._sample = name or ""
            self._write()

    def _write(self) -> None:
        self._since = time.time()
        if self._record is not None:
            self._record.write(self._step, self._phase, self._sample, self._since)


HERE = Position()
