"""Writes a checkpoint of ours tensor by tensor, from a source of Hugging Face tensors, without a model or a job.

What is written is what a job of one rank saves with its model states alone: the files of torch's distributed
checkpoint format, one per thread, hashed while they are written. A thread holds one tensor of ours at a time, and most
of those are views of the source's mapped files.

Hazard: megatron-core loads a parameter's checkpoint only where the extra state of its linear layers is there too, empty
as it is; `EXTRA_STATES` lists those layers.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.checkpoint.safe_reading import COMMON_FILE
from megatron_vlm.conversion.mappings import GatedMLP, Mapping
from megatron_vlm.conversion.sources import WeightSource

EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
MAX_THREADS = 4  # further ones would wait for the disk
_BACKEND = {  # megatron-core's words for the format (`save_config`)
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Share:
    """What one thread wrote: a file, and where in it each chunk is."""

    file: str
    record: FileRecord
    results: list[WriteResult]
    tensors: dict[str, TensorStorageMetadata]


class HashingFile:
    """A file that is hashed while it is written. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """All of it."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        written = 0
        while written < len(view):
            written += self._file.write(view[written:]) or 0
        self.size_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> FileRecord:
        """Brings it to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self.size_bytes, self._hash.hexdigest())


def write_tensors(
    directory: Path, table: Sequence[Mapping], source: WeightSource, advance: Callable[[int], None]
) -> dict[str, FileRecord]:
    """Writes the weights of the table's parameters into a checkpoint's directory.

    Args:
        table: of the whole model; the source has all its tensors, in their shapes.
        advance: told the bytes of each tensor written; may be called by several threads.

    Returns:
        Size and hash of every file written.

    Raises:
        OSError: the disk.
    """
    shares = _shares(table, source, min(MAX_THREADS, os.cpu_count() or 1))
    with ThreadPoolExecutor(len(shares)) as pool:
        work = [pool.submit(_write_share, directory, n, share, source, advance) for n, share in enumerate(shares)]
        written = [share.result() for share in work]
    tensors = {name: place for share in written for name, place in share.tensors.items()}
    results = [share.results for share in written]
    files = {share.file: share.record for share in written}
    with open(directory / COMMON_FILE, "wb") as file:
        torch.save({}, file)
    extra = _write_extra_states(directory, table)
    files[extra.file] = extra.record
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**tensors}
    entries |= {result.index.fqn: BytesStorageMetadata() for result in extra.results}
    FileSystemWriter(directory).finish(Metadata(entries), [*results, extra.results])
    (directory / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    return files


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


def _write_share(
    directory: Path, number: int, share: Sequence[Mapping], source: WeightSource, advance: Callable[[int], None]
) -> _Share:
    name = f"__{number}_0.distcp"
    file = HashingFile(directory / name)
    results: list[WriteResult] = []
    tensors = {}
    for entry in share:
        chunks = []
        for offset, tensor in _chunks(entry, source):
            offsets = torch.Size([offset, *(0 for _ in tensor.shape[1:])][: tensor.dim()])
            chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
            start = file.size_bytes
            torch.save(tensor, cast(IO[bytes], file))
            results.append(_result(MetadataIndex(entry.name, offsets), name, start, file.size_bytes))
            advance(tensor.nbytes)
            dtype = tensor.dtype
        rows = sum(chunk.sizes[0] for chunk in chunks) if chunks[0].sizes else None
        size = chunks[0].sizes if rows is None else torch.Size([rows, *chunks[0].sizes[1:]])
        tensors[entry.name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
    return _Share(name, file.close(), results, tensors)


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


def _write_extra_states(directory: Path, table: Sequence[Mapping]) -> _Share:
    name = "__extra_0.distcp"
    file = HashingFile(directory / name)
    empty = io.BytesIO()
    torch.save([None], empty)
    results = []
    for entry in table:
        layer, _, kind = entry.name.rpartition(".")
        if kind == "weight" and layer.endswith(EXTRA_STATES):
            start = file.size_bytes
            file.write(empty.getbuffer())
            index = MetadataIndex(f"{layer}._extra_state/shard_0_1")
            results.append(_result(index, name, start, file.size_bytes))
    return _Share(name, file.close(), results, {})


def _result(index: MetadataIndex, file: str, start: int, end: int) -> WriteResult:
    return WriteResult(index=index, size_in_bytes=end - start, storage_data=_StorageInfo(file, start, end - start))
