"""A directory's weight files: which tensors are where, found from headers, and read one at a time.

Everything about the files is checked before any tensor is read: every shard is there and whole, the index names what
the shards hold, and nothing lies outside the directory. Tensors are views of the mapped file, so they cost no memory
of the process until something is computed from them. Where they are is known without torch, which takes seconds to be
imported, so that copying can begin before.

Hazards: a pickle runs code, so one is read by torch's unpickler for plain data only; a tensor of a mapped file must not
be written to.
"""

import mmap
import os
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.conversion.weights.safetensors_header import MAX_HEADER_BYTES, read_header
from megatron_vlm.errors import ConversionError, one_line
from megatron_vlm.runtime.files import can_be_a_name, check_regular, open_regular, parse_json, read_text, stays_inside

if TYPE_CHECKING:  # imported where a tensor is made
    from torch import Tensor

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
INDEXES = (SAFETENSORS_INDEX, PICKLE_INDEX)
_ZIP = b"PK\x03\x04"  # what torch.save writes since 1.6, and alone can be mapped
LENGTH_BYTES = 8  # of the number that heads a safetensors file


@dataclass(frozen=True)
class Span:
    """Bytes of a file.

    Args:
        version: of the file, as `file_version` gives it: it may be replaced between two looks.
    """

    path: Path
    version: tuple[int, ...]
    start: int
    num_bytes: int

    def part(self, start: int, num_bytes: int) -> "Span":
        """Selects some of them."""
        return Span(self.path, self.version, self.start + start, num_bytes)


def file_version(handle: int) -> tuple[int, ...]:
    """Facts that differ where a file of this name has been written again or replaced."""
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_mtime_ns


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor's bytes, row by row without gaps: in a file or in memory.

    Args:
        dtype: torch's name for it ("bfloat16").
    """

    dtype: str
    shape: tuple[int, ...]
    data: Span | memoryview

    def rows(self, start: int, stop: int) -> Span | memoryview:
        """The bytes of some of its rows, the elements of its first dimension."""
        row_bytes = prod(self.shape[1:]) * DTYPES[self.dtype].num_bytes
        if isinstance(self.data, Span):
            return self.data.part(start * row_bytes, (stop - start) * row_bytes)
        return self.data[start * row_bytes : stop * row_bytes]


def stored_in_memory(tensor: "Tensor", name: str, origin: str | Path) -> StoredTensor:
    """A tensor's place; it must not change before the bytes are read. One with gaps between its rows is copied.

    Raises:
        ConversionError: a dtype that no model here has.
    """
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConversionError(f"{origin}: {name} is of dtype {dtype}, needs one of {', '.join(DTYPES)}")
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return StoredTensor(dtype, tuple(tensor.shape), flat.numpy().data)


class WeightFile(Protocol):
    """Tensors by their names on the disk."""

    @property
    def path(self) -> Path: ...
    def names(self) -> Collection[str]: ...
    def read(self, name: str) -> "Tensor": ...
    def dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]: ...
    def stored(self, name: str) -> StoredTensor: ...


class SafetensorsFile:
    """One safetensors file, mapped. `header` is its first bytes, up to the first tensor's.

    Raises:
        ConversionError: not such a file, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map, self._version = _mapped(path)
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        end = LENGTH_BYTES + length
        if len(self._map) < LENGTH_BYTES or end > len(self._map):
            raise ConversionError(f"{path}: {len(self._map)} bytes, which is not a whole safetensors header")
        if length > MAX_HEADER_BYTES:
            raise ConversionError(f"{path}: a safetensors header of {length} bytes, needs up to {MAX_HEADER_BYTES}")
        self.header = bytes(self._map[:end])
        self._places = read_header(self.header[LENGTH_BYTES:], len(self._map) - end, path)

    def names(self) -> Collection[str]:
        """Names in the order of their bytes."""
        return self._places.keys()

    def read(self, name: str) -> "Tensor":
        """A view of the file."""
        import torch

        kind, shape, start, _ = self._places[name]
        dtype, count = getattr(torch, kind), prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=len(self.header) + start).view(shape)

    def dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, by torch's name, and shape, as the header says."""
        return self._places[name][:2]

    def stored(self, name: str) -> StoredTensor:
        """Place of a tensor."""
        dtype, shape, start, end = self._places[name]
        return StoredTensor(dtype, shape, Span(self.path, self._version, len(self.header) + start, end - start))


def _mapped(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    """The file, and which version of it."""
    try:
        with open_regular(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a tensor must think that it can be written
            return mapped, file_version(file.fileno())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be opened: {one_line(error)}") from error


class PickleFile:
    """One file of torch.save, read as plain data: mapped, or whole where a torch before 1.6 wrote it.

    Raises:
        ConversionError: one that would run code, is damaged, or is no dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            with open_regular(path) as file:
                is_zip, size_bytes = file.read(len(_ZIP)) == _ZIP, os.fstat(file.fileno()).st_size
            tensors = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{path}: its pickle is not plain tensors and could run code when loaded: do not use it, or save the "
                "model again as safetensors"
            ) from error
        except Exception as error:  # damaged bytes make torch and the unpickler raise almost anything
            raise ConversionError(f"{path}: cannot be read: {one_line(error, first=True)}") from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ConversionError(f"{path}: holds no dictionary of tensors")
        for name, tensor in tensors.items():
            _check_plain(name, tensor, size_bytes, path)
        self._tensors: dict[str, Tensor] = tensors

    def names(self) -> Collection[str]:
        """Names in the file's order."""
        return self._tensors.keys()

    def read(self, name: str) -> "Tensor":
        """A view of the file."""
        return self._tensors[name].detach()

    def dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, by torch's name, and shape."""
        tensor = self._tensors[name]
        return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)

    def stored(self, name: str) -> StoredTensor:
        """Place of a tensor in the mapped file. Raises ConversionError for a dtype that no model here has."""
        return stored_in_memory(self._tensors[name], name, self.path)


def _check_plain(name: object, tensor: "Tensor", size_bytes: int, path: Path) -> None:
    """Raises ConversionError for what torch may store, too, and is no array in the file: sparse or without
    data, or repeating itself (`expand`) to more than the file's bytes."""
    import torch

    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not isinstance(name, str) or not is_plain or tensor.device.type != "cpu":
        raise ConversionError(f"{path}: {name!r} is not a plain named tensor; save the model as safetensors")
    if tensor.numel() * tensor.element_size() > size_bytes:
        raise ConversionError(f"{path}: {name!r} is of shape {list(tensor.shape)}, more than the file's bytes")


def open_weight_file(path: Path) -> WeightFile:
    """Opens a weight file by its suffix. Raises ConversionError."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


class WeightFolder:
    """The weights of a directory: its safetensors files, or where it has none its `pytorch_model*.bin`; an index first.

    Raises:
        ConversionError: no weights; a shard that is missing or damaged; an index that names a file outside the
            directory, a tensor its file lacks, or not every tensor of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index, names, listed = _listing(folder)
        self.files = [open_weight_file(_inside(folder, name, self.index)) for name in names]
        self.places: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.names():
                if name in self.places:
                    raise ConversionError(f"{folder}: {name} is in {self.places[name].path.name} and {file.path.name}")
                self.places[name] = file
        if listed is not None:
            self._check_index(listed)

    def _check_index(self, listed: dict[str, str]) -> None:
        for name, file in listed.items():
            if name not in self.places or self.places[name].path.name != file:
                raise ConversionError(f"{self.index}: {name} is not in {file}")
        if unlisted := sorted(self.places.keys() - listed.keys()):
            raise ConversionError(f"{self.index} does not list {unlisted[0]} of {self.places[unlisted[0]].path.name}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        found = parse_json(read_text(index), unique_keys=True)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{index}: not an index of weights: {one_line(error)}") from error
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ConversionError(f"{index}: not an index of weights: needs a weight_map from tensors to names of files")
    return listed


def _listing(folder: Path) -> tuple[Path | None, list[str], dict[str, str] | None]:
    """The index that counts, the weight files, and tensor -> file where there is an index."""
    for name, pattern in ((SAFETENSORS_INDEX, "*.safetensors"), (PICKLE_INDEX, "pytorch_model*.bin")):
        if os.path.lexists(folder / name):
            listed = _read_index(folder / name)
            return folder / name, sorted(set(listed.values())), listed
        if found := sorted(path.name for path in folder.glob(pattern)):
            return None, found, None
    raise ConversionError(f"{folder}: found no weights, needs *.safetensors or pytorch_model*.bin")


def _inside(folder: Path, name: str, index: Path | None) -> Path:
    """A link out of the directory is fine (the hub's cache has them), a name that leads out of it is not."""
    if not can_be_a_name(name):
        raise ConversionError(f"{index}: names the file {name!r}, a name that no file can have")
    if not stays_inside(name) or "/" in name:
        raise ConversionError(f"{index}: names the file {name!r}, which lies outside of {folder}")
    try:
        check_regular(folder / name)
    except FileNotFoundError as error:
        raise ConversionError(f"{folder / name}: this shard is missing") from error
    except OSError as error:
        raise ConversionError(f"{folder / name}: cannot be opened: {one_line(error)}") from error
    return folder / name
