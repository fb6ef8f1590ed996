"""Checkpoints hold data: a pickle in one that would run code is refused before anything reads it.

A native checkpoint has three kinds of pickles, and megatron-core and torch read two of them without restraint:
`.metadata` by a plain `pickle.load`, and the objects between the tensors of `*.distcp` with `weights_only=False`. The
third, `common.pt`, is read with torch's default, which the user's environment may switch. So all three are read here
first, by unpicklers that know a short list of names and call nothing else; what they accept, the plain ones repeat.

Hazard: a new version of torch may name another class in `.metadata`; it is then refused by name: it belongs in `_DATA`.
"""

import io
import pickle
import re
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_vlm.errors import CheckpointError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

_CHECKPOINT = "torch.distributed.checkpoint"
_DATA = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a layout up by its name
    ("pathlib", "PosixPath"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (f"{_CHECKPOINT}.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}
_NAMED_BY_TORCH = re.compile(r"\bGLOBAL ([\w.]+)")


class _CodeFoundError(pickle.UnpicklingError):
    """A pickle names something that is no data; the message is that name."""


def _member(kind: Any, name: Any) -> Enum:
    """Stands for `getattr`, by which early versions of Python 3.11 (3.11.2, Debian 12's) pickle members of enums."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise _CodeFoundError("builtins.getattr")
    return kind[name]


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _DATA and not is_dtype:
            raise _CodeFoundError(f"{module}.{name}")
        return super().find_class(module, name)


def refuse_code(directory: Path) -> None:
    """Reads every pickle of a native checkpoint as data alone, before megatron-core reads it in its own way.

    Raises:
        CheckpointError: one that would run code, or cannot be read; names the file.
    """
    objects = _read(directory / METADATA_FILE, _find_objects)
    _read(directory / COMMON_FILE, _load_data)
    for stored in objects:
        _read(directory / stored.relative_path, partial(_load_part, stored.offset, stored.length))


def _find_objects(file: IO[bytes]) -> list[Any]:
    """Where the objects that are no tensors stand: file, offset and length of each."""
    metadata = _DataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not what torch writes there")
    kinds, places = metadata.state_dict_metadata, metadata.storage_data
    return [stored for place, stored in places.items() if isinstance(kinds[place.fqn], BytesStorageMetadata)]


def _load_part(offset: int, length: int, file: IO[bytes]) -> Any:
    file.seek(offset)
    return _load_data(io.BytesIO(file.read(length)))


def _load_data(file: IO[bytes]) -> Any:
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # what layers without extra state keep
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _NAMED_BY_TORCH.search(str(error))
        if named is None:  # torch's own text would advise to read it all the same
            raise ValueError("its pickle is not plain data") from error
        raise _CodeFoundError(named[1]) from error


def _read(path: Path, read: Callable[[IO[bytes]], Any]) -> Any:
    try:
        with open(path, "rb") as file:
            return read(file)
    except _CodeFoundError as error:
        raise CheckpointError(
            f"{path} would run {error} when it is loaded, a checkpoint holds data only: do not use it, it may have "
            "been tampered with"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes make an unpickler raise almost anything
        raise CheckpointError(f"{path} is damaged: {str(error).partition(chr(10))[0] or repr(error)}") from error
