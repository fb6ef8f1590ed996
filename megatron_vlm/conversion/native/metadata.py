"""The table of the pieces in the files of a checkpoint of torch's distributed format.

Hazard: megatron-core loads a parameter's checkpoint only where the extra state of its linear layers is there too, empty
as it is.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
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

from megatron_vlm.checkpoint.manifest import BACKENDS_FILE, COMMON_FILE
from megatron_vlm.conversion.native.byte_files import HashingFile
from megatron_vlm.conversion.native.plan import Parameter, Piece

BACKEND = {  # megatron-core's words for the format (`save_config`)
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_extra_states(file: HashingFile, parameters: Sequence[Parameter]) -> list[Piece]:
    """Writes those of the linear layers whose weights are among the parameters. Raises OSError."""
    empty = io.BytesIO()
    torch.save([None], empty)
    pieces = []
    for parameter in parameters:
        if parameter.is_matrix:
            start = file.size_bytes
            file.write(empty.getbuffer())
            layer = parameter.name.removesuffix(".weight")
            pieces.append(Piece(f"{layer}._extra_state/shard_0_1", file.name, start, file.size_bytes))
    return pieces


def write_metadata(directory: Path, files: Sequence[Sequence[Piece]]) -> None:
    """Writes the files that describe the pieces of each file. Raises OSError."""
    pieces = [piece for of_file in files for piece in of_file]
    results = [[_result(piece) for piece in of_file] for of_file in files]
    FileSystemWriter(directory).finish(Metadata({piece.entry: _entry(piece) for piece in pieces}), results)
    torch.save({}, directory / COMMON_FILE)
    (directory / BACKENDS_FILE).write_text(json.dumps(BACKEND), encoding="utf-8")


def _entry(piece: Piece) -> TensorStorageMetadata | BytesStorageMetadata:
    if piece.dtype is None:
        return BytesStorageMetadata()
    size = torch.Size(piece.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(getattr(torch, piece.dtype)), size, [chunk])


def _result(piece: Piece) -> WriteResult:
    offsets = None if piece.dtype is None else torch.Size([0] * len(piece.shape))
    size_bytes = piece.end - piece.start
    storage = _StorageInfo(piece.file, piece.start, size_bytes)
    return WriteResult(MetadataIndex(piece.entry, offsets), size_in_bytes=size_bytes, storage_data=storage)
