"""What a checkpoint keeps of the directory it was imported from, so that an export gives back the same files.

    origin/origin.json      format, and per weight file its tensors: name, dtype, shape; the SHA-256 of those left out
    origin/headers/FILE     the header of a safetensors file, byte for byte, which fixes where in it everything is
    origin/files/...        all files that are no weights: config, tokenizer, processor, index
    origin/spare.safetensors    tensors no model here has, because it computes them: rotary frequencies, position ids

A checkpoint trained from an imported one keeps it too (`carry`).
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vlm.conversion.files import SafetensorsFile
from megatron_vlm.conversion.formats.base import ForeignModel, read_json
from megatron_vlm.errors import CheckpointError
from megatron_vlm.runtime.logging import get_logger

FOLDER = "origin"
MAX_CARRIED_BYTES = 64 * 2**20  # of one file
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_RECORD, _HEADERS, _FILES, _SPARE = "origin.json", "headers", "files", "spare.safetensors"

logger = get_logger(__name__)


@dataclass(frozen=True)
class OriginTensor:
    """A tensor of a weight file: its name there and here, its dtype as torch calls it."""

    disk_name: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Origin:
    """What is known of the directory a model came from.

    Args:
        folder: `origin/` of a checkpoint.
        format: registered name.
        weights: by file name, its tensors in the file's order.
        referenced: tensors that came from elsewhere (a tower that is only named): canonical name -> dtype and SHA-256.
    """

    folder: Path
    format: str
    weights: dict[str, list[OriginTensor]]
    referenced: dict[str, tuple[str, str]]

    @classmethod
    def of(cls, checkpoint: Path) -> "Origin | None":
        """That of a checkpoint; None where it was trained from scratch. Raises ConversionError, CheckpointError."""
        folder = checkpoint / FOLDER
        if not folder.is_dir():
            return None
        record = read_json(folder / _RECORD)
        try:
            weights = {
                file: [OriginTensor(name, own, dtype, tuple(shape)) for name, own, dtype, shape in tensors]
                for file, tensors in record["weights"].items()
            }
            return cls(folder, record["format"], weights, {k: (a, b) for k, (a, b) in record["referenced"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / _RECORD} is damaged: {error!r}") from error

    def header(self, file: str) -> bytes | None:
        """Of a safetensors file; None for one that was a pickle."""
        path = self.folder / _HEADERS / file
        return path.read_bytes() if path.is_file() else None

    def spare(self) -> dict[str, Tensor]:
        """The tensors no model here has, by canonical name."""
        path = self.folder / _SPARE
        if not path.is_file():
            return {}
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.names()}

    def files(self) -> list[Path]:
        """The carried files, inside `origin/files`."""
        root = self.folder / _FILES
        return [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]

    def copy_files(self, into: Path, leave_out: Iterable[str] = ()) -> None:
        """Writes the carried files. Raises OSError."""
        for file in self.files():
            if str(file) not in leave_out:
                (into / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / _FILES / file, into / file)


def write_origin(checkpoint: Path, foreign: ForeignModel, spare: Iterable[str]) -> None:
    """Keeps what an export needs to give the directory back.

    Args:
        spare: canonical names of tensors that no model here has.

    Raises:
        OSError: the disk.
    """
    own = foreign.own
    if own is None:
        return
    folder = checkpoint / FOLDER
    (folder / _HEADERS).mkdir(parents=True)
    canonical = {disk_name: name for name, disk_name in own.disk_names.items()}
    weights: dict[str, list[list[Any]]] = {}
    for file in own.weights.files:
        if isinstance(file, SafetensorsFile):
            (folder / _HEADERS / file.path.name).write_bytes(file.header)
        tensors = [(name, file.read(name)) for name in file.names()]
        weights[file.path.name] = [[name, canonical[name], _name(t.dtype), [*t.shape]] for name, t in tensors]
    referenced = {
        name: (_name(tensor.dtype), digest(tensor))
        for name in sorted(set(foreign.source.names()) - set(own.names()))
        for tensor in [foreign.source.read(name)]
    }
    record = {"format": foreign.format, "weights": weights, "referenced": referenced}
    (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
    kept = {name: foreign.source.read(name).clone() for name in spare if name in own.names()}
    if kept:
        save_file(kept, folder / _SPARE)
    _copy_files(foreign.folder, folder / _FILES)


def carry(start: Path, checkpoint: Path) -> None:
    """Gives a checkpoint that is being written the origin of the one its weights come from. Raises OSError."""
    if (start / FOLDER).is_dir():
        shutil.copytree(start / FOLDER, checkpoint / FOLDER)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _copy_files(folder: Path, into: Path) -> None:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts) or path.suffix in WEIGHT_SUFFIXES:
            continue
        if path.stat().st_size > MAX_CARRIED_BYTES:
            logger.warning("%s is left out: %d bytes, more than %d", path, path.stat().st_size, MAX_CARRIED_BYTES)
            continue
        (into / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into / inside)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
