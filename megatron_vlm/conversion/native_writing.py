"""Writes a checkpoint of ours tensor by tensor, from a source of Hugging Face tensors, without a model or a job.

What is written is what a job of one rank saves with its model states alone: the files of torch's distributed
checkpoint format, one per thread, hashed while they are written. A thread holds one tensor of ours at a time, and most
of those are views of the source's mapped files.

Hazard: megatron-core loads a parameter's checkpoint only where the extra state of its linear layers is there too, empty
as it is; `EXTRA_STATES` lists those layers.
"""

import contextlib
import fcntl
import hashlib
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.conversion.mappings import GatedMLP, Mapping
from megatron_vlm.conversion.sources import WeightSource

EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
NUM_THREADS = 4  # however few the cores: they wait for the disk in turn
_PIECE_BYTES = 16 * 2**20  # written at a time


@dataclass(frozen=True)
class Piece:
    """Where a checkpoint has one piece of one of its entries.

    Args:
        entry: its name.
        place: the piece's first element in the tensor; None for an entry of bytes.
        shape, dtype: of the piece.
        start, end: its bytes in the file.
    """

    entry: str
    file: str
    start: int
    end: int
    place: tuple[int, ...] | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8


class HashingFile:
    """A file that is hashed while it is written, past the page cache where the file system allows it.

    Filling the cache with what nobody reads again costs more than the disk: half of a whole import. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._set_direct(True)
        self._hash = hashlib.sha256()
        self._piece = mmap.mmap(-1, _PIECE_BYTES)  # aligned, as such writes need it
        self._num_waiting = 0
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """All of it, though its end may wait for `close`."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        rest = view
        while rest:
            taken = rest[: _PIECE_BYTES - self._num_waiting]
            self._piece[self._num_waiting : self._num_waiting + len(taken)] = taken
            self._num_waiting += len(taken)
            rest = rest[len(taken) :]
            if self._num_waiting == _PIECE_BYTES:
                self._write_waiting()
        self.size_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing that `close` would not do."""

    def close(self) -> FileRecord:
        """Brings it to the disk."""
        self._set_direct(False)  # the end is of any length
        self._write_waiting()
        os.fsync(self._handle)
        os.close(self._handle)
        return FileRecord(self.size_bytes, self._hash.hexdigest())

    def _write_waiting(self) -> None:
        with memoryview(self._piece) as piece:
            rest = piece[: self._num_waiting]
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        self._num_waiting = 0

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # EINVAL: a file system without it, as a memory disk
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)


class NativeWriter:
    """Writes a table's parameters into a checkpoint's directory, in the background.

    Within the context: `start` for each part of the model as soon as it is known to be whole, then `finish`. Leaving it
    by an error ends the writing; the directory is then of no use.

    Args:
        advance: told the bytes of each tensor written; may be called by several threads.
    """

    def __init__(self, directory: Path, source: WeightSource, advance: Callable[[int], None]) -> None:
        self._directory, self._source, self._advance = directory, source, advance
        self._pool = ThreadPoolExecutor(NUM_THREADS)
        self._shares: list[Future[tuple[list[Piece], FileRecord]]] = []
        self._table: list[Mapping] = []
        self._is_given_up = threading.Event()
        self._checksums = contextlib.ExitStack()

    def __enter__(self) -> "NativeWriter":
        self._checksums.enter_context(_no_second_checksum())
        return self

    def __exit__(self, *error: object) -> None:
        self._is_given_up.set()
        self._pool.shutdown(cancel_futures=True)
        self._checksums.close()

    def start(self, table: Sequence[Mapping]) -> None:
        """Begins with a part of the model; the source has its tensors, in their shapes."""
        self._table += table
        for share in _shares(table, self._source, NUM_THREADS):
            path = self._directory / f"__{len(self._shares)}_0.distcp"
            self._shares.append(self._pool.submit(self._write_share, path, share))

    def finish(self) -> dict[str, FileRecord]:
        """Waits for all and writes what the checkpoint says of them -> size and hash of every file of tensors.

        Raises:
            OSError: the disk.
        """
        from megatron_vlm.conversion.native_metadata import write_metadata  # takes a second, while the threads write

        written = [share.result() for share in self._shares]
        written.append(_write_extra_states(self._directory / "__extra_0.distcp", self._table))
        write_metadata(self._directory, [pieces for pieces, _ in written])
        return {pieces[0].file: record for pieces, record in written}

    def _write_share(self, path: Path, share: Sequence[Mapping]) -> tuple[list[Piece], FileRecord]:
        file = HashingFile(path)
        pieces = []
        for entry in share:
            for row, tensor in _chunks(entry, self._source):
                if self._is_given_up.is_set():
                    raise CancelledError
                start, place = file.size_bytes, (row, *(0 for _ in tensor.shape[1:]))[: tensor.dim()]
                torch.save(tensor, cast(IO[bytes], file))
                shape = tuple(tensor.shape)
                pieces.append(Piece(entry.name, path.name, start, file.size_bytes, place, shape, tensor.dtype))
                self._advance(tensor.nbytes)
        return pieces, file.close()


@contextlib.contextmanager
def _no_second_checksum() -> Iterator[None]:
    """torch.save computes a CRC-32 of what is hashed already, at half the cost of the hash."""
    computed = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(computed)


def _shares(table: Sequence[Mapping], source: WeightSource, number: int) -> list[list[Mapping]]:
    """The table in as many parts of about as many bytes, each in the table's order."""
    sizes = {entry.name: sum(source.read(name).nbytes for name in entry.sources) for entry in table}
    shares: list[list[Mapping]] = [[] for _ in range(number)]
    loads = [0] * number
    for entry in sorted(table, key=lambda entry: -sizes[entry.name]):
        lightest = loads.index(min(loads))
        shares[lightest].append(entry)
        loads[lightest] += sizes[entry.name]
    order = {entry.name: place for place, entry in enumerate(table)}
    return [sorted(share, key=lambda entry: order[entry.name]) for share in shares if share]


def _chunks(entry: Mapping, source: WeightSource) -> Iterable[tuple[int, Tensor]]:
    """Our parameter in pieces along dimension 0, each a tensor of its own memory or mapping, with its first row.

    All are of one dtype: where the sources' differ, one that holds the values of each.
    """
    full = [source.read(name) for name in entry.sources]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in full))
    full = [tensor.to(dtype) for tensor in full]
    if not isinstance(entry, GatedMLP):
        yield 0, _alone(entry.shard(full, 0, 1))
        return
    offset = 0
    for part in full:  # gate above up, as they are
        yield offset, _alone(part)
        offset += part.shape[0]


def _alone(tensor: Tensor) -> Tensor:
    """torch writes all the memory that a view is of."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_extra_states(path: Path, table: Sequence[Mapping]) -> tuple[list[Piece], FileRecord]:
    file = HashingFile(path)
    empty = io.BytesIO()
    torch.save([None], empty)
    pieces = []
    for entry in table:
        layer, _, kind = entry.name.rpartition(".")
        if kind == "weight" and layer.endswith(EXTRA_STATES):
            start = file.size_bytes
            file.write(empty.getbuffer())
            pieces.append(Piece(f"{layer}._extra_state/shard_0_1", path.name, start, file.size_bytes))
    return pieces, file.close()
