"""`.metadata` as torch's planners take it, made anew of what `stored_entries` accepted."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vlm.checkpoint.manifest import METADATA_FILE, FileRecord
from megatron_vlm.checkpoint.stored_entries import StoredArray, read_entries
from megatron_vlm.errors import CheckpointError
from megatron_vlm.runtime.garbage import not_collected


def read_metadata(directory: Path, files: Mapping[str, FileRecord]) -> Metadata:
    """Reads what a checkpoint holds, and where, as torch has it.

    Args:
        directory: the checkpoint.
        files: its manifest's; no other is ever named by what is returned.

    Raises:
        CheckpointError: as `read_entries`, and for a number format that this version of torch does not have.
    """
    found = read_entries(directory, files)
    for name, one in found.entries.items():
        if one is not None and not hasattr(torch, one.dtype):
            path = directory / METADATA_FILE
            raise CheckpointError(f"{path}: {name} is of dtype {one.dtype}, which torch {torch.__version__} lacks")
    with not_collected():
        return Metadata(
            state_dict_metadata={
                name: BytesStorageMetadata() if one is None else _tensor(one) for name, one in found.entries.items()
            },
            storage_data={
                MetadataIndex(name, None if offsets is None else torch.Size(offsets), place.number): _StorageInfo(
                    place.file, place.offset, place.length
                )
                for (name, offsets), place in found.places.items()
            },
        )


def _tensor(found: StoredArray) -> TensorStorageMetadata:
    properties = TensorProperties(
        getattr(torch, found.dtype), requires_grad=found.requires_grad, pin_memory=found.pin_memory
    )
    chunks = [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in found.chunks]
    return TensorStorageMetadata(properties, torch.Size(found.size), chunks)
