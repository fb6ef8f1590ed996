"""The record of what a checkpoint was imported from, read without torch: `origin` says what it holds and writes it."""

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.conversion.weights.files import LENGTH_BYTES, SafetensorsFile
from megatron_vlm.conversion.weights.safetensors_header import read_header
from megatron_vlm.errors import CheckpointError, ConversionError, one_line, shown
from megatron_vlm.runtime.files import read_bytes, read_json, read_text, stays_inside

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FOLDER = "origin"
RECORD_FILE, HEADERS, FILES, SPARE = "origin.json", "headers", "files", "spare.safetensors"
RECORD = f"{FOLDER}/{RECORD_FILE}"
MAX_CARRIED_BYTES = 64 * 2**20  # of one file
CARD = "README.md"  # a model card, whose head may name a licence
_HEAD = re.compile(r"---\n.*?\n---\n", re.DOTALL)
_LICENCE = re.compile(r"""^license:\s*["']?([\w.+-]+)["']?\s*$""", re.MULTILINE)


def _plain_name(file: str) -> str:
    if not stays_inside(file) or "/" in file:
        raise ValueError(f"found {file!r}, needs the name of a file in one folder")
    return file


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"found dtype {name!r}, needs one of {', '.join(DTYPES)}")
    return name


_FileName: TypeAlias = Annotated[str, AfterValidator(_plain_name)]
_Dtype: TypeAlias = Annotated[str, AfterValidator(_known_dtype)]
_Size: TypeAlias = Annotated[int, Field(strict=True, ge=0)]


class _Record(BaseModel):
    """origin.json: whoever wrote it, its files stay in their folders and its dtypes are dtypes."""

    format: str
    weights: dict[_FileName, list[tuple[str, str, _Dtype, tuple[_Size, ...]]]]
    referenced: dict[str, tuple[_Dtype, str, str]]
    reading: dict[str, Any]


@dataclass(frozen=True)
class OriginTensor:
    """A tensor of a weight file: its name there and here, its dtype as torch calls it."""

    disk_name: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype itself."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Origin:
    """The record of the directory a model came from.

    Args:
        folder: `origin/` of a checkpoint.
        format: registered name.
        weights: by file name, its tensors in the file's order; none of a model that was put together from several
            directories.
        referenced: tensors that came from elsewhere (a tower that is only named): canonical name -> dtype, SHA-256, and
            SHA-256 when rounded to bf16.
        reading: what the directory was read as (`reading_of`).
    """

    folder: Path
    format: str
    weights: dict[str, list[OriginTensor]]
    referenced: dict[str, tuple[str, str, str]]
    reading: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Path) -> "Origin | None":
        """A checkpoint's record; None where it was trained from scratch. Raises ConversionError, CheckpointError."""
        folder = checkpoint / FOLDER
        if RECORD not in Manifest.read(checkpoint).files:
            return None
        try:
            known = _Record.model_validate(read_json(folder / RECORD_FILE))
        except OSError as error:
            raise CheckpointError(f"{folder / RECORD_FILE} cannot be read: {one_line(error)}") from error
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise CheckpointError(f"{folder / RECORD_FILE} is damaged: {place}: {shown(fault['msg'])}") from error
        except ValueError as error:  # pydantic's are some, too
            raise CheckpointError(f"{folder / RECORD_FILE} is damaged: {one_line(error)}") from error
        weights = {file: [OriginTensor(*entry) for entry in tensors] for file, tensors in known.weights.items()}
        return cls(folder, known.format, weights, known.referenced, known.reading)

    def header(self, file: str) -> bytes | None:
        """Header of a safetensors file; None for one that was a pickle. Raises CheckpointError where it is not that
        of the file's tensors."""
        path = self.folder / HEADERS / file
        if not os.path.lexists(path):
            return None
        tensors = {t.disk_name: (t.dtype, t.shape) for t in self.weights[file]}
        num_bytes = sum(prod(shape) * DTYPES[dtype].num_bytes for dtype, shape in tensors.values())
        try:
            header = read_bytes(path)
            places = read_header(header[LENGTH_BYTES:], num_bytes, path)
        except (OSError, ConversionError) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error
        is_whole = int.from_bytes(header[:LENGTH_BYTES], "little") == len(header) - LENGTH_BYTES
        if not is_whole or [*tensors.items()] != [(name, (p.dtype, p.shape)) for name, p in places.items()]:
            raise CheckpointError(f"{path} is damaged: it is not the header of the tensors in {RECORD_FILE}")
        return header

    def spare(self) -> dict[str, "Tensor"]:
        """The tensors no model here has, by canonical name."""
        path = self.folder / SPARE
        if not os.path.lexists(path):
            return {}
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.names()}

    def files(self) -> list[Path]:
        """The carried files, inside `origin/files`."""
        root = self.folder / FILES
        return [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]

    def is_read_as(self, reading: dict[str, Any]) -> bool:
        """Whether a checkpoint is still what the directory was read as. Records of old say nothing of the template."""
        return {
            key: value for key, value in reading.items() if key in self.reading or key != "template"
        } == self.reading

    def licence(self) -> str | None:
        """Licence that the head of the model card names, one word as the hub has it; None where it names none."""
        card = self.folder / FILES / CARD
        if not card.is_file() or (head := _HEAD.match(read_text(card, MAX_CARRIED_BYTES))) is None:
            return None
        named = _LICENCE.search(head[0])
        return None if named is None else named[1]

    def copy_files(self, into: Path, only: Collection[str] | None = None, leave_out: Collection[str] = ()) -> None:
        """Writes the carried files. Raises OSError."""
        for file in self.files():
            if (only is None or str(file) in only) and str(file) not in leave_out:
                (into / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / FILES / file, into / file)
