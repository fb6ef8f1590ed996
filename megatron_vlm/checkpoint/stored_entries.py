"""`.metadata` of a checkpoint: its tensors and objects and the place of each, read without torch.

torch's planners trust this file: by it they choose what is a tensor and what is an object, which file to open and where
to read. Python's `pickle.load`, torch's own way, would run whatever it names. Here it is read as data (`plain_pickle`),
and every field is checked for its exact type; `stored_metadata` makes torch's objects of what was accepted.

Hazard: a new version of torch may write another field or name; it is then refused by name, and belongs into `_NAMES`.
"""

import pickle
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

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
DTYPES = (  # torch's names for those that it has in any version here; a test compares
    "bfloat16 bits16 bits1x8 bits2x4 bits4x2 bits8 bool complex128 complex32 complex64 float16 float32 "
    "float4_e2m1fn_x2 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int1 int16 "
    "int2 int3 int32 int4 int5 int6 int64 int7 int8 qint32 qint8 quint2x4 quint4x2 quint8 uint1 uint16 uint2 "
    "uint3 uint32 uint4 uint5 uint6 uint64 uint7 uint8"
).split()
CONTIGUOUS = ("TORCH_CONTIGUOUS_FORMAT", 0)  # of torch's memory formats: name and value, by which a pickle has it
_FORMATS = (CONTIGUOUS[0], "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
_ENUMS = {_MEMORY: _FORMATS, f"{_PLANNER}.WriteItemType": ("TENSOR", "SHARD", "BYTE_IO")}
_NAMES = {
    *(f"torch.{name}" for name in DTYPES),
    *_ENUMS,
    *(f"{_METADATA}.{name}" for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *(f"{_METADATA}.{name}" for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    *(f"{_PLANNER}.{name}" for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem")),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", _SIZE, _LAYOUT, _STORAGE),
}
_USED, _UNUSED = ("state_dict_metadata", "storage_data"), ("planner_data", "storage_meta", "version")  # of Metadata


class Chunk(NamedTuple):
    """A part of a stored tensor: where it begins in each dimension, and how long it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class StoredArray(NamedTuple):
    """A tensor of a checkpoint; `dtype` is torch's name for it ("bfloat16")."""

    dtype: str
    size: tuple[int, ...]
    chunks: list[Chunk]
    requires_grad: bool
    pin_memory: bool


class Place(NamedTuple):
    """Place of a chunk or an object; `number` counts chunks, where torch does."""

    number: int | None
    file: str
    offset: int
    length: int


class StoredEntries(NamedTuple):
    """Entries of a checkpoint, and their places.

    Args:
        entries: by name; None for an object that is no tensor.
        places: by name and the chunk's offsets, None of an object.
    """

    entries: dict[str, StoredArray | None]
    places: dict[tuple[str, tuple[int, ...] | None], Place]


def read_entries(directory: Path, files: Mapping[str, FileRecord]) -> StoredEntries:
    """Reads and checks what a checkpoint holds, and where.

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
        return _Reader(files).entries(found)


class _Reader:
    """Checks a pickle's values. Raises UnpicklingError."""

    def __init__(self, files: Mapping[str, FileRecord]) -> None:
        self._files = files
        self._sizes: dict[int, tuple[int, ...]] = {}  # by the identity of what they were made of, which many share

    def entries(self, found: Any) -> StoredEntries:
        """Exactly what is allowed."""
        if type(found) is not Instance:
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not what torch writes there")
        fields = _fields(found, f"{_METADATA}.Metadata", _USED, _UNUSED)
        entries: dict[str, StoredArray | None] = {}
        for name, entry in _pairs(fields["state_dict_metadata"]):
            if type(name) is not str or name in entries:
                raise pickle.UnpicklingError(f"it names an entry twice, or by a {type(name).__name__}")
            entries[name] = self._entry(entry)
        places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
        for key, place in _pairs(fields["storage_data"]):
            name, offsets, index = self._index(key, entries)
            if (name, offsets) in places:
                raise pickle.UnpicklingError(f"it says twice where {name} lies")
            places[name, offsets] = self._place(place, index)
        for name, one in entries.items():
            if any((name, part) not in places for part in ([None] if one is None else [c.offsets for c in one.chunks])):
                raise pickle.UnpicklingError(f"it does not say where {name} lies")
        return StoredEntries(entries, places)

    def _entry(self, found: Any) -> StoredArray | None:
        kind = getattr(found, "kind", None)
        if kind == f"{_METADATA}.BytesStorageMetadata":
            if found.arguments != () or found.state not in (None, []):
                raise pickle.UnpicklingError("it has an object with fields that torch does not write")
            return None
        fields = _fields(found, f"{_METADATA}.TensorStorageMetadata", ("properties", "size", "chunks"))
        size = self._size(fields["size"])
        if prod(size) >= MAX_ELEMENTS or type(fields["chunks"]) is not list:
            raise pickle.UnpicklingError("it has a tensor that is too large, or not in chunks")
        chunks = [self._chunk(chunk, size) for chunk in fields["chunks"]]
        if sum(prod(chunk.sizes) for chunk in chunks) != prod(size):
            raise pickle.UnpicklingError("it has a tensor that its chunks do not fill")
        dtype, requires_grad, pin_memory = _properties(fields["properties"])
        return StoredArray(dtype, size, chunks, requires_grad, pin_memory)

    def _chunk(self, found: Any, whole: tuple[int, ...]) -> Chunk:
        fields = _fields(found, f"{_METADATA}.ChunkStorageMetadata", ("offsets", "sizes"))
        offsets, sizes = self._size(fields["offsets"]), self._size(fields["sizes"])
        if not len(offsets) == len(sizes) == len(whole) or any(
            o + n > most for o, n, most in zip(offsets, sizes, whole, strict=True)
        ):
            raise pickle.UnpicklingError("it has a chunk outside its tensor")
        return Chunk(offsets, sizes)

    def _index(self, found: Any, entries: Mapping[str, Any]) -> tuple[str, tuple[int, ...] | None, int | None]:
        fields = _fields(found, f"{_METADATA}.MetadataIndex", ("fqn", "index"), ("offset",))
        name, number = fields["fqn"], fields["index"]
        if type(name) is not str or name not in entries:
            raise pickle.UnpicklingError("it gives the place of something that is not among its entries")
        if number is not None and not _is_count(number):
            raise pickle.UnpicklingError(f"it counts the chunks of {name} by a {type(number).__name__}")
        offset = fields.get("offset")
        return name, None if offset is None else self._size(offset), number

    def _place(self, found: Any, index: int | None) -> Place:
        fields = _fields(found, _STORAGE, ("relative_path", "offset", "length"))
        file, start, size = fields["relative_path"], fields["offset"], fields["length"]
        if type(file) is not str or "/" in file or file not in self._files:
            raise pickle.UnpicklingError(f"it names a part {file!r}, which the manifest does not list")
        if not _is_count(start) or not _is_count(size) or start + size > self._files[file].size_bytes:
            raise pickle.UnpicklingError(f"it has an entry outside its file {file}")
        return Place(index, file, start, size)

    def _size(self, found: Any) -> tuple[int, ...]:
        known = self._sizes.get(id(found))
        if known is None:
            if type(found) is not Instance or found.kind != _SIZE or found.state is not None:
                raise pickle.UnpicklingError(f"it has a {type(found).__name__} where torch writes a size")
            numbers = found.arguments[0] if len(found.arguments) == 1 else None
            if type(numbers) is not tuple or len(numbers) > MAX_DIMS or not all(map(_is_count, numbers)):
                raise pickle.UnpicklingError("it has a size that is none")
            known = self._sizes[id(found)] = numbers
        return known


def _properties(found: Any) -> tuple[str, bool, bool]:
    """A tensor's number format, and its two switches; torch writes all the rest of them alike."""
    state = _state(found, f"{_METADATA}.TensorProperties")
    if type(state) is tuple and len(state) == 5 and type(state[0]) is Name:
        dtype, layout, requires_grad, memory, pinned = state
        name = dtype.name.removeprefix("torch.")
        is_dense = type(layout) is Instance and (layout.kind, layout.arguments) == (_LAYOUT, ("torch.strided",))
        is_plain = type(memory) is Instance and memory.kind == _MEMORY
        is_plain = is_plain and memory.arguments in tuple((one,) for one in CONTIGUOUS)
        if name in DTYPES and is_dense and is_plain and type(requires_grad) is type(pinned) is bool:
            return name, requires_grad, pinned
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
