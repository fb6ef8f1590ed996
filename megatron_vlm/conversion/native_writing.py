"""Writes a checkpoint of ours by copying bytes from where Hugging Face's tensors lie, without a model or a job.

What is written is what a job of one rank saves with its model states alone: the files of torch's distributed
checkpoint format, one per thread, hashed while they are written. A parameter of ours is runs of rows of tensors that
are there already, so nothing is computed and no tensor is held: bytes go from file to file by pieces. Nor is torch
needed, whose import takes as long as the disk takes for a gigabyte.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.conversion.files import Span, StoredTensor, stored_in_memory
from megatron_vlm.conversion.mappings import Mapping
from megatron_vlm.conversion.torch_archive import around

NUM_THREADS = 4  # however few the cores: they wait for the disk in turn
_LESS_URGENT = 10  # niceness they add: what runs beside them, importing and comparing, takes longer than they do
_PIECE_BYTES = 16 * 2**20  # written at a time


@dataclass(frozen=True)
class Parameter:
    """A parameter of ours to be written, whole.

    Args:
        name: its entry's in the checkpoint.
        dtype: torch's name for it.
        runs: its bytes, from front to back.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Span | memoryview, ...]

    @property
    def size_bytes(self) -> int:
        """Of all runs."""
        return sum(run.size_bytes if isinstance(run, Span) else run.nbytes for run in self.runs)


@dataclass(frozen=True)
class Piece:
    """Where a checkpoint has one of its entries: bytes `start` to `end` of `file`.

    Args:
        dtype: torch's name for it; None for an entry of bytes.
    """

    entry: str
    file: str
    start: int
    end: int
    shape: tuple[int, ...] = ()
    dtype: str | None = None


def lay_out(table: Sequence[Mapping], stored: Callable[[str], StoredTensor]) -> list[Parameter]:
    """What a part of the model is made of. Where the dtypes of a parameter's sources differ, it takes one that holds
    the values of each, and its bytes are in memory."""
    parameters = []
    for entry in table:
        sources = [stored(name) for name in entry.sources]
        if len({source.dtype for source in sources}) > 1:
            sources = _promoted(sources)
        runs = tuple(sources[source].rows(start, stop) for source, start, stop in entry.row_runs())
        shape = sources[0].shape
        if len(sources) > 1:
            shape = (sum(source.shape[0] for source in sources), *shape[1:])
        parameters.append(Parameter(entry.name, sources[0].dtype, shape, runs))
    return parameters


def _promoted(sources: Sequence[StoredTensor]) -> list[StoredTensor]:
    import torch

    tensors = [
        torch.frombuffer(bytearray(source.read()), dtype=getattr(torch, source.dtype)).view(source.shape)
        for source in sources
    ]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [stored_in_memory(tensor.to(dtype)) for tensor in tensors]


class HashingFile:
    """A file that is hashed while it is written, past the page cache where the file system allows it.

    Filling the cache with what nobody reads again costs more than the disk: half of a whole import. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._set_direct(True)
        self._hash = hashlib.sha256()
        self._piece = memoryview(mmap.mmap(-1, _PIECE_BYTES))  # aligned, as such writes need it
        self._num_waiting = 0
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """All of it, though its end may wait for `close`."""
        rest = memoryview(data).cast("B")
        while rest:
            space = self._space(len(rest))
            space[:] = rest[: len(space)]
            rest = rest[len(space) :]
            self._filled(len(space))

    def copy(self, handle: int, start: int, size_bytes: int) -> None:
        """As `write`, bytes of an open file."""
        end = start + size_bytes
        while start < end:
            num_read = os.preadv(handle, [self._space(end - start)], start)
            if num_read == 0:
                raise OSError(f"a source file ended {end - start} bytes before a tensor did")
            start += num_read
            self._filled(num_read)

    def close(self) -> FileRecord:
        """Brings it to the disk."""
        self._set_direct(False)  # the end is of any length
        self._write_waiting()
        os.fsync(self._handle)
        os.close(self._handle)
        return FileRecord(self.size_bytes, self._hash.hexdigest())

    def _space(self, num_wanted: int) -> memoryview:
        """Where the next bytes go."""
        return self._piece[self._num_waiting : self._num_waiting + num_wanted]

    def _filled(self, num_bytes: int) -> None:
        self._hash.update(self._piece[self._num_waiting : self._num_waiting + num_bytes])
        self._num_waiting += num_bytes
        self.size_bytes += num_bytes
        if self._num_waiting == _PIECE_BYTES:
            self._write_waiting()

    def _write_waiting(self) -> None:
        rest = self._piece[: self._num_waiting]
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        self._num_waiting = 0

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # EINVAL: a file system without it, as a memory disk
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)


class NativeWriter:
    """Writes parameters into a checkpoint's directory, in the background.

    Within the context: `start` for each part of the model as soon as it is known, then `finish`. Leaving it by an error
    ends the writing; the directory is then of no use.

    Args:
        advance: told the bytes of each tensor written; may be called by several threads.
    """

    def __init__(self, directory: Path, advance: Callable[[int], None]) -> None:
        self.directory = directory
        self._advance = advance
        self._begin()

    def _begin(self) -> None:
        self.started: list[Parameter] = []
        self._pool = ThreadPoolExecutor(NUM_THREADS)
        self._shares: list[Future[tuple[list[Piece], FileRecord]]] = []
        self._is_given_up = threading.Event()

    def __enter__(self) -> "NativeWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._give_up()

    def _give_up(self) -> None:
        self._is_given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, parameters: Sequence[Parameter]) -> None:
        """Begins with a part of the model."""
        self.started += parameters
        for share in _shares(parameters, NUM_THREADS):
            path = self._path(len(self._shares))
            self._shares.append(self._pool.submit(self._write_share, path, share))

    def start_again(self) -> None:
        """Gives up what was started and removes it."""
        self._give_up()
        for number in range(len(self._shares)):
            self._path(number).unlink(missing_ok=True)
        self._begin()

    def finish(self) -> dict[str, FileRecord]:
        """Waits for all and writes what the checkpoint says of them -> size and hash of every file of tensors.

        Raises:
            OSError: the disk.
        """
        from megatron_vlm.conversion.native_metadata import write_extra_states, write_metadata  # with torch

        written = [share.result() for share in self._shares]
        extra = self._path(len(written))
        file = HashingFile(extra)
        written.append((write_extra_states(file, extra, self.started), file.close()))
        write_metadata(self.directory, [pieces for pieces, _ in written])
        return {self._path(number).name: record for number, (_, record) in enumerate(written)}

    def _path(self, number: int) -> Path:
        """As torch calls the file of one rank's writer."""
        return self.directory / f"__{number}_0.distcp"

    def _write_share(self, path: Path, share: Sequence[Parameter]) -> tuple[list[Piece], FileRecord]:
        os.nice(_LESS_URGENT)  # on Linux, of this thread alone
        file = HashingFile(path)
        pieces = []
        with contextlib.ExitStack() as opened:
            sources = {run.path for parameter in share for run in parameter.runs if isinstance(run, Span)}
            handles = {source: opened.enter_context(open(source, "rb")).fileno() for source in sources}
            for parameter in share:
                if self._is_given_up.is_set():
                    raise CancelledError
                pieces.append(_write_parameter(file, path.name, parameter, handles))
                self._advance(parameter.size_bytes)
        return pieces, file.close()


def _write_parameter(file: HashingFile, name: str, parameter: Parameter, handles: dict[Path, int]) -> Piece:
    start = file.size_bytes
    before, after = around(parameter.dtype, parameter.shape, parameter.size_bytes)
    file.write(before)
    for run in parameter.runs:
        if isinstance(run, Span):
            file.copy(handles[run.path], run.start, run.size_bytes)
        else:
            file.write(run)
    file.write(after)
    return Piece(parameter.name, name, start, file.size_bytes, parameter.shape, parameter.dtype)


def _shares(parameters: Sequence[Parameter], number: int) -> list[list[Parameter]]:
    """As many parts of about as many bytes, each in the order given."""
    shares: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].size_bytes):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += parameters[index].size_bytes
    return [[parameters[index] for index in sorted(share)] for share in shares if share]
