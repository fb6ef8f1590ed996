"""A checkpoint of ours as a source of Hugging Face tensors: one parameter at a time, whatever layout saved it.

Hazard: the files of torch's checkpoint format are pickles; they are read as plain data (`checkpoint/safe_reading.py`).
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.stored_metadata import read_metadata
from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.errors import CheckpointError, one_line
from megatron_vlm.models.cuts import Mapping
from megatron_vlm.runtime.files import open_regular

MODEL_PARTS = ("language.", "vision.", "projector.")  # a checkpoint holds optimizer states beside them
_NUM_KEPT = 2  # parameters kept in memory per thread: a file's order puts o_proj between k_proj and q_proj
_NUM_SHOWN = 3


class NativeSource:
    """The tensors of the table by canonical name; any number of threads may read.

    Args:
        directory: a checkpoint.
        table: of its whole model.

    Raises:
        CheckpointError: unreadable, or not the table's model.
    """

    def __init__(self, directory: Path, table: Sequence[Mapping]) -> None:
        self.origin = str(directory)
        self._directory = directory
        metadata = read_metadata(directory, Manifest.read(directory).files)
        self._storage = metadata.storage_data
        self._stored = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if missing := [entry.name for entry in table if entry.name not in self._stored]:
            raise CheckpointError(f"{directory} lacks {len(missing)} parameters: {', '.join(missing[:_NUM_SHOWN])}")
        known = {entry.name for entry in table}
        if more := sorted(name for name in self._stored.keys() - known if name.startswith(MODEL_PARTS)):
            raise CheckpointError(
                f"{directory} holds {len(more)} parameters that its configs have no place for: "
                f"{', '.join(more[:_NUM_SHOWN])}"
            )
        for entry in table:
            dtype = str(self._stored[entry.name].properties.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{directory}: {entry.name} is of dtype {dtype}, needs one of {', '.join(DTYPES)}"
                )
        self._entries = {name: entry for entry in table for name in entry.sources}
        self._threads = threading.local()

    def names(self) -> Collection[str]:
        """All canonical names."""
        return self._entries.keys()

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype, without reading."""
        return self._stored[self._entries[name].name].properties.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor, without reading."""
        entry = self._entries[name]
        return entry.shapes[entry.sources.index(name)]

    def read(self, name: str) -> Tensor:
        """One whole tensor. Raises CheckpointError for damaged files."""
        entry = self._entries[name]
        kept: OrderedDict[str, dict[str, Tensor]] = self._threads.__dict__.setdefault("kept", OrderedDict())
        if entry.name not in kept:
            while len(kept) >= _NUM_KEPT:
                kept.popitem(last=False)
            kept[entry.name] = dict(zip(entry.sources, entry.unshard([self._whole(entry)]), strict=True))
        tensor = kept[entry.name][name]
        if tuple(tensor.shape) != self.shape(name):
            raise CheckpointError(
                f"{self.origin}: {entry.name} gives {name} the shape {list(tensor.shape)}, its config needs "
                f"{list(self.shape(name))}"
            )
        return tensor

    def _whole(self, entry: Mapping) -> Tensor:
        """The parameter out of its chunks."""
        stored = self._stored[entry.name]
        chunks = {chunk.offsets: self._chunk(entry.name, chunk) for chunk in stored.chunks}
        if len(chunks) == 1:
            return next(iter(chunks.values()))
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        for offsets, chunk in chunks.items():
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, chunk.shape, strict=True))] = chunk
        return whole

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place, dtype = self._storage[MetadataIndex(name, chunk.offsets)], self._stored[name].properties.dtype
        try:
            with open_regular(self._directory / place.relative_path) as stream:
                stream.seek(place.offset)
                tensor: Tensor = torch.load(io.BytesIO(stream.read(place.length)), "cpu", weights_only=True)
            if type(tensor) is not Tensor:
                raise TypeError(f"it holds a {type(tensor).__name__}")
            if (tensor.shape, tensor.dtype) != (chunk.sizes, dtype):
                found = f"{list(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"it holds {found}, .metadata says {list(chunk.sizes)} of {dtype}")
            return tensor
        except Exception as error:  # damaged bytes make torch and the unpickler raise almost anything
            raise CheckpointError(
                f"{self._directory / place.relative_path}: {name} cannot be read: {one_line(error, first=True)}"
            ) from error
