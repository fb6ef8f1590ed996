"""`.metadata`: what tensors and objects a checkpoint holds and where each lies, read once and made anew.

torch's planners trust this file: by it they choose what is a tensor and what is an object, which file to open and where
to read. Python's `pickle.load`, torch's own way, would run whatever it names. Here it is read as data (`plain_pickle`),
every field is checked for its exact type, and what a load is given are objects made here, of what was accepted.

Hazard: a new version of torch may write another field or name; it is then refused by name, and belongs into `_NAMES`.
"""

import pickle
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_vlm.checkpoint.manifest import METADATA_FILE, FileRecord
from megatron_vlm.checkpoint.plain_pickle import Instance, Name, Pairs, read_pickle
from megatron_vlm.checkpoint.safe_reading import told_of
from megatron_vlm.runtime.files import MAX_TEXT_BYTES, read_bytes
from megatron_vlm.runtime.garbage import not_collected

ALWAYS_READ_BYTES = 1 << 24  # however small the parts that it describes, each of which is larger than its entry
MAX_ELEMENTS, MAX_DIMS = 1 << 53, 64  # of a tensor; the second is torch's own
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_SIZE, _LAYOUT, _MEMORY = "torch.Size", "torch.serialization._get_layout", f"{_METADATA}._MEM_FORMAT_ENCODING"
_DTYPES = {f"torch.{name}": kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
_CONTIGUOUS = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
_ENUMS = {_MEMORY: set(_MEM_FORMAT_ENCODING.__members__), f"{_PLANNER}.WriteItemType": set(WriteItemType.__members__)}
_NAMES = {
    *_DTYPES,
    *_ENUMS,
    *(f"{_METADATA}.{kind.__name__}" for kind in (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex)),
    *(f"{_METADATA}.{name}" for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    *(f"{_PLANNER}.{name}" for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem")),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", _SIZE, _LAYOUT, _STORAGE),
}
_USED, _UNUSED = ("state_dict_metadata", "storage_data"), ("planner_data", "storage_meta", "version")  # of Metadata


def read_metadata(directory: Path, files: Mapping[str, FileRecord]) -> Metadata:
    """Reads a checkpoint's table of contents.

    Args:
        directory: the checkpoint.
        files: its manifest's; no other is ever named by what is returned.

    Raises:
        CheckpointError: a pickle that would run code, or is not what torch writes there, or cannot be read.
    """
    path = directory / METADATA_FILE
    with told_of(path), not_collected():
        most = ALWAYS_READ_BYTES + sum(record.size_bytes for record in files.values())
        found = read_pickle(read_bytes(path, min(MAX_TEXT_BYTES, most)), _NAMES, _ENUMS)
        return _Reader(files).metadata(found)


class _Reader:
    """Makes torch's objects of a pickle's values. Raises UnpicklingError."""

    def __init__(self, files: Mapping[str, FileRecord]) -> None:
        self._files = files
        self._sizes: dict[int, torch.Size] = {}  # by the identity of what they were made of, which many share

    def metadata(self, found: Any) -> Metadata:
        """Exactly what is allowed, made anew."""
        if type(found) is not Instance:
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not what torch writes there")
        fields = _fields(found, f"{_METADATA}.Metadata", _USED, _UNUSED)
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, entry in _pairs(fields["state_dict_metadata"]):
            if type(name) is not str or name in entries:
                raise pickle.UnpicklingError(f"it names an entry twice, or by a {type(name).__name__}")
            entries[name] = self._entry(entry)
        places: dict[MetadataIndex, _StorageInfo] = {}
        for key, place in _pairs(fields["storage_data"]):
            index = self._index(key, entries)
            if index in places:
                raise pickle.UnpicklingError(f"it says twice where {index.fqn} lies")
            places[index] = self._place(place)
        for name, entry in entries.items():
            chunks = [chunk.offsets for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
            if any(MetadataIndex(name, offsets) not in places for offsets in chunks):
                raise pickle.UnpicklingError(f"it does not say where {name} lies")
        return Metadata(state_dict_metadata=entries, storage_data=places)

    def _entry(self, found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        kind = getattr(found, "kind", None)
        if kind == f"{_METADATA}.BytesStorageMetadata":
            if found.arguments != () or found.state not in (None, []):
                raise pickle.UnpicklingError("it has an object with fields that torch does not write")
            return BytesStorageMetadata()
        fields = _fields(found, f"{_METADATA}.TensorStorageMetadata", ("properties", "size", "chunks"))
        size = self._size(fields["size"])
        if prod(size) >= MAX_ELEMENTS or type(fields["chunks"]) is not list:
            raise pickle.UnpicklingError("it has a tensor that is too large, or not in chunks")
        chunks = [self._chunk(chunk, size) for chunk in fields["chunks"]]
        if sum(prod(chunk.sizes) for chunk in chunks) != prod(size):
            raise pickle.UnpicklingError("it has a tensor that its chunks do not fill")
        return TensorStorageMetadata(_properties(fields["properties"]), size, chunks)

    def _chunk(self, found: Any, whole: torch.Size) -> ChunkStorageMetadata:
        fields = _fields(found, f"{_METADATA}.ChunkStorageMetadata", ("offsets", "sizes"))
        offsets, sizes = self._size(fields["offsets"]), self._size(fields["sizes"])
        if not len(offsets) == len(sizes) == len(whole) or any(
            o + n > most for o, n, most in zip(offsets, sizes, whole, strict=True)
        ):
            raise pickle.UnpicklingError("it has a chunk outside its tensor")
        return ChunkStorageMetadata(offsets, sizes)

    def _index(self, found: Any, entries: Mapping[str, Any]) -> MetadataIndex:
        fields = _fields(found, f"{_METADATA}.MetadataIndex", ("fqn", "index"), ("offset",))
        name, number = fields["fqn"], fields["index"]
        if type(name) is not str or name not in entries:
            raise pickle.UnpicklingError("it says where something lies that is no entry of it")
        if number is not None and not _is_count(number):
            raise pickle.UnpicklingError(f"it counts the chunks of {name} by a {type(number).__name__}")
        offset = fields.get("offset")
        return MetadataIndex(name, None if offset is None else self._size(offset), number)

    def _place(self, found: Any) -> _StorageInfo:
        fields = _fields(found, _STORAGE, ("relative_path", "offset", "length"))
        file, start, size = fields["relative_path"], fields["offset"], fields["length"]
        if type(file) is not str or "/" in file or file not in self._files:
            raise pickle.UnpicklingError(f"it names a part {file!r}, which the manifest does not list")
        if not _is_count(start) or not _is_count(size) or start + size > self._files[file].size_bytes:
            raise pickle.UnpicklingError(f"it has an entry outside its file {file}")
        return _StorageInfo(file, start, size)

    def _size(self, found: Any) -> torch.Size:
        known = self._sizes.get(id(found))
        if known is None:
            if type(found) is not Instance or found.kind != _SIZE or found.state is not None:
                raise pickle.UnpicklingError(f"it has a {type(found).__name__} where torch writes a size")
            numbers = found.arguments[0] if len(found.arguments) == 1 else None
            if type(numbers) is not tuple or len(numbers) > MAX_DIMS or not all(map(_is_count, numbers)):
                raise pickle.UnpicklingError("it has a size that is none")
            known = self._sizes[id(found)] = torch.Size(numbers)
        return known


def _properties(found: Any) -> TensorProperties:
    """A tensor's number format; torch writes all the rest of them alike."""
    state = _state(found, f"{_METADATA}.TensorProperties")
    if type(state) is tuple and len(state) == 5 and type(state[0]) is Name and state[0].name in _DTYPES:
        dtype, layout, requires_grad, memory, pinned = state
        is_dense = type(layout) is Instance and (layout.kind, layout.arguments) == (_LAYOUT, ("torch.strided",))
        is_plain = type(memory) is Instance and memory.kind == _MEMORY
        is_plain = is_plain and memory.arguments in ((_CONTIGUOUS.value,), (_CONTIGUOUS.name,))
        if is_dense and is_plain and type(requires_grad) is type(pinned) is bool:
            return TensorProperties(_DTYPES[dtype.name], requires_grad=requires_grad, pin_memory=pinned)
    raise pickle.UnpicklingError("it has a tensor that is not a plain one of a known number format")


def _state(found: Any, kind: str) -> Any:
    if type(found) is not Instance or found.kind != kind or found.arguments != ():
        what = found.kind if type(found) is Instance else type(found).__name__
        raise pickle.UnpicklingError(f"it has a {what} where torch writes a {kind}")
    return found.state


def _fields(found: Any, kind: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An instance's fields: all that are needed, and none but these and the optional ones."""
    fields: dict[str, Any] = {}
    for name, value in _pairs(_state(found, kind)):
        if type(name) is not str or name in fields or name not in needed + optional:
            raise pickle.UnpicklingError(f"it has a {kind} with a field that torch does not write")
        fields[name] = value
    if missing := [name for name in needed if name not in fields]:
        raise pickle.UnpicklingError(f"it has a {kind} without {missing[0]}")
    return fields


def _pairs(found: Any) -> Iterator[tuple[Any, Any]]:
    if type(found) is not Pairs:
        raise pickle.UnpicklingError(f"it has a {type(found).__name__} where torch writes a dictionary")
    return iter(found)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
