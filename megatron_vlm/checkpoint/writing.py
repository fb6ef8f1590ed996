"""One rank's part of a checkpoint, and the process that writes it while training goes on.

The rank copies what it saves into memory that it shares with the writer, and goes on; so the snapshot is of one moment,
and needs one copy of what is saved. The writer is a child of multiprocessing's fork server, like the data workers, not
a fork of the rank itself: a fork keeps every page that the rank changes while it lives, gradients and activations too
(measured: 1.9 times what is saved, steps of 1.19 times the length), and the locks of threads and the GPU of the rank.
megatron-core's own callers are such a fork, which also waits for ever for a writer that was killed, and a process that
needs a GPU.

Hazard: the writer may outlive its rank by a moment. It only ever writes into a directory that is no checkpoint yet.
"""

import io
import mmap
import multiprocessing
import os
import signal
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.runtime.signals import BeginAsChild, kept_from_children

PART_SUFFIX = ".distcp"
ALIGNMENT_BYTES = 64
NICENESS = 15  # of a writer: where cores are short, training goes first


@dataclass(frozen=True)
class Outcome:
    """The end of writing a part; `error` says what went wrong, None where nothing did."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Part:
    """The files of one rank in `directory`; rank 0 also vouches for the files that are there already."""

    directory: Path
    rank: int
    items: list[tuple[WriteItem, Tensor | io.BytesIO]]

    def write(self) -> Outcome:
        """Writes, brings to the disk and hashes."""
        name = f"__{self.rank}_0{PART_SUFFIX}"
        transforms, format = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
        try:
            with open(self.directory / name, "wb") as stream:
                results = [
                    _write_item(transforms, stream, _alone(data), item, name, format) for item, data in self.items
                ]
            files = [self.directory / name]
            if self.rank == 0:
                files += [f for f in self.directory.rglob("*") if f.is_file() and f.suffix != PART_SUFFIX]
            return Outcome(results, records_of(self.directory, files))
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return Outcome(error=reason_of(error))


@dataclass(frozen=True)
class _Place:
    """Place of a tensor in the snapshot's memory."""

    offset_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """The tensor there, out of the memory's bytes [n]."""
        size_bytes = self.shape.numel() * self.dtype.itemsize
        return memory.narrow(0, self.offset_bytes, size_bytes).view(self.dtype).view(self.shape)


class SharedMemory:
    """Bytes that a rank shares with its writers, sent to a process as a handle. Kept from save to save: to be given new
    pages takes as long as to copy into them.

    Args:
        size_bytes: at least one.
        handle: of memory that exists. Raises OSError where there is no memory for more.
    """

    def __init__(self, size_bytes: int, handle: int | None = None) -> None:
        self.handle = os.memfd_create("checkpoint") if handle is None else handle  # /dev/shm is small in containers
        try:
            os.truncate(self.handle, size_bytes)
            self.bytes = torch.frombuffer(mmap.mmap(self.handle, size_bytes), dtype=torch.uint8)
        except OSError:
            os.close(self.handle)
            raise

    def close(self) -> None:
        """Lets go of it in this process."""
        os.close(self.handle)
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_memory_from, (len(self.bytes), DupFd(self.handle))


def _shared_memory_from(size_bytes: int, handle: Any) -> SharedMemory:
    return SharedMemory(size_bytes, handle.detach())


@dataclass(frozen=True)
class Snapshot:
    """A part whose tensors are `_Place`s in shared memory."""

    part: Part
    memory: SharedMemory

    @classmethod
    def of(cls, part: Part, memory: SharedMemory | None) -> "Snapshot":
        """Copies the part's tensors, into `memory` where it is large enough. Raises OSError where there is none."""
        places: list[Any] = []
        size_bytes = 0
        for _, data in part.items:
            if isinstance(data, Tensor):
                places.append(_Place(size_bytes, data.shape, data.dtype))
                size_bytes += -(-data.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            else:
                places.append(data)
        if memory is None or len(memory.bytes) < size_bytes:
            if memory is not None:
                memory.close()
            memory = SharedMemory(max(1, size_bytes))
        for place, (_, data) in zip(places, part.items, strict=True):
            if isinstance(data, Tensor):
                place.of(memory.bytes).copy_(data)
        return cls(_with(part, places), memory)

    def restored(self) -> Part:
        """The part, its tensors where they were copied to."""
        items = [data for _, data in self.part.items]
        return _with(self.part, [x.of(self.memory.bytes) if isinstance(x, _Place) else x for x in items])


class BackgroundWriter:
    """A process that writes a part. Where it cannot be started, that is its outcome.

    Args:
        part: its tensors may change as soon as this is built.
        memory: of an earlier writer that has ended.
    """

    def __init__(self, part: Part, memory: SharedMemory | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process: BaseProcess | None = None
        self.memory: SharedMemory | None = None
        try:
            snapshot = Snapshot.of(part, memory)
            self.memory = snapshot.memory
            process = context.Process(target=_write, args=(BeginAsChild(), snapshot, sender))
            with kept_from_children(with_tracker=True):
                process.start()
            self._process = process
        except OSError as error:  # no memory for the snapshot, no process
            sender.send(Outcome(error=reason_of(error)))
        sender.close()  # the child's end is the only one: it closes when the child ends

    @property
    def is_writing(self) -> bool:
        """Whether the outcome is still to come."""
        return not self._receiver.poll()

    def outcome(self) -> Outcome:
        """Waits for it. The process is gone afterwards."""
        try:
            outcome: Outcome = self._receiver.recv()
        except EOFError:
            assert self._process is not None
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            outcome = Outcome(error=f"the process that wrote it {how}")
        self.end()
        return outcome

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        self._receiver.close()


def reason_of(error: BaseException) -> str:
    """Reason of a failure, in one line: the system's word (disk full) where there is one behind what a library says."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error).partition("\n")[0] or repr(error)


def start_server() -> None:
    """Has the fork server import what a writer needs, now and in the background, unless it runs already."""
    modules = forkserver._forkserver._preload_modules  # type: ignore[attr-defined]
    multiprocessing.set_forkserver_preload([*modules, *({__name__} - set(modules))])
    with kept_from_children(with_tracker=True):
        forkserver.ensure_running()


def _write(begin: BeginAsChild, snapshot: Snapshot, sender: Connection) -> None:
    """The life of a writer."""
    begin()
    torch.set_num_threads(1)
    os.nice(NICENESS)
    sender.send(snapshot.restored().write())


def _with(part: Part, data: list[Any]) -> Part:
    return replace(part, items=[(item, one) for (item, _), one in zip(part.items, data, strict=True)])


def _alone(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    """A tensor on the CPU, without the rest of the memory it is a view of, which would be written too."""
    if isinstance(data, Tensor):
        data = data.cpu()
        return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()
    return data
