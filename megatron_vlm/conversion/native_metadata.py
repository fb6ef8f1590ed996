"""What a checkpoint of torch's distributed format says of the pieces in its files.

Apart from `native_writing` since this part of torch takes a second to be imported, in which writing has begun.
"""

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

from megatron_vlm.checkpoint.safe_reading import COMMON_FILE
from megatron_vlm.conversion.native_writing import Piece

BACKEND = {  # megatron-core's words for the format (`save_config`)
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_metadata(directory: Path, files: Sequence[Sequence[Piece]]) -> None:
    """Writes the files that describe the pieces of each file.

    Args:
        files: the pieces of one entry follow each other and cut it along dimension 0.

    Raises:
        OSError: the disk.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for piece in (piece for pieces in files for piece in pieces):
        known = entries.get(piece.entry)
        if piece.place is None:
            entries[piece.entry] = BytesStorageMetadata()
        elif isinstance(known, TensorStorageMetadata):
            known.chunks.append(_chunk(piece))
            known.size = torch.Size([known.size[0] + piece.shape[0], *known.size[1:]])
        else:
            properties = TensorProperties(piece.dtype)
            entries[piece.entry] = TensorStorageMetadata(properties, torch.Size(piece.shape), [_chunk(piece)])
    results = [[_result(piece) for piece in pieces] for pieces in files]
    FileSystemWriter(directory).finish(Metadata(entries), results)
    torch.save({}, directory / COMMON_FILE)
    (directory / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    assert piece.place is not None
    return ChunkStorageMetadata(torch.Size(piece.place), torch.Size(piece.shape))


def _result(piece: Piece) -> WriteResult:
    offsets = None if piece.place is None else torch.Size(piece.place)
    size_bytes = piece.end - piece.start
    storage = _StorageInfo(piece.file, piece.start, size_bytes)
    return WriteResult(MetadataIndex(piece.entry, offsets), size_in_bytes=size_bytes, storage_data=storage)
