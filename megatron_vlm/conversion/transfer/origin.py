"""A checkpoint's record of the directory it was imported from, so that an export gives back the same files.

    origin/origin.json      format, what the directory was read as, and per weight file its tensors: name, dtype, shape;
                            the SHA-256 of those left out
    origin/headers/FILE     the header of a safetensors file, byte for byte, which fixes where in it everything is
    origin/files/...        all files that are no weights: config, tokenizer, processor, index; and a tower's directory
                            inside the model's, weights too
    origin/spare.safetensors    tensors no model here has, because it computes them: rotary frequencies, position ids

A checkpoint trained from an imported one keeps it too (`copy_origin`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.formats.base import ForeignModel, read_json
from megatron_vlm.conversion.formats.recipe import settings_of
from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.conversion.weights.files import LENGTH_BYTES, SafetensorsFile
from megatron_vlm.conversion.weights.safetensors_header import read_header
from megatron_vlm.conversion.weights.sources import FolderSource
from megatron_vlm.data.tokenizer import load_tokenizer
from megatron_vlm.errors import CheckpointError, ConversionError, one_line, shown
from megatron_vlm.models.hf_config import config_from_path
from megatron_vlm.runtime.files import read_bytes, read_text, stays_inside
from megatron_vlm.runtime.logging import get_logger

FOLDER = "origin"
MAX_CARRIED_BYTES = 64 * 2**20  # of one file
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
CARD = "README.md"  # a model card, whose head may name a licence
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE")
SENTENCEPIECE_FILE = "tokenizer.model"  # which transformers 5 does not write, and the original LLaVA reads
_ASKED = ("template", "template_arguments")
_HEAD = re.compile(r"---\n.*?\n---\n", re.DOTALL)
_LICENCE = re.compile(r"""^license:\s*["']?([\w.+-]+)["']?\s*$""", re.MULTILINE)
_RECORD, _HEADERS, _FILES, _SPARE = "origin.json", "headers", "files", "spare.safetensors"
_BESIDE_THE_MODEL = ("architectures", "dtype", "_name_or_path")  # of a config: what made it, and how it is stored
RECORD = f"{FOLDER}/{_RECORD}"
_OF_A_CALL = ("padding", "truncation")  # what a tokenizer keeps of its last use

logger = get_logger(__name__)


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
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
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
        record = read_json(folder / _RECORD)
        try:
            known = _Record.model_validate(record)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise CheckpointError(f"{folder / _RECORD} is damaged: {place}: {shown(fault['msg'])}") from error
        weights = {file: [OriginTensor(*entry) for entry in tensors] for file, tensors in known.weights.items()}
        return cls(folder, known.format, weights, known.referenced, known.reading)

    def header(self, file: str) -> bytes | None:
        """Header of a safetensors file; None for one that was a pickle. Raises CheckpointError where it is not the
        file's tensors."""
        path = self.folder / _HEADERS / file
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
            raise CheckpointError(f"{path} is damaged: it is not the header of the tensors in {_RECORD}")
        return header

    def spare(self) -> dict[str, Tensor]:
        """The tensors no model here has, by canonical name."""
        path = self.folder / _SPARE
        if not os.path.lexists(path):
            return {}
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.names()}

    def files(self) -> list[Path]:
        """The carried files, inside `origin/files`."""
        root = self.folder / _FILES
        return [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]

    def is_read_as(self, reading: dict[str, Any]) -> bool:
        """Whether a checkpoint is still what the directory was read as. Records of old say nothing of the template."""
        return {
            key: value for key, value in reading.items() if key in self.reading or key != "template"
        } == self.reading

    def licence(self) -> str | None:
        """Licence that the head of the model card names, one word as the hub has it; None where it names none."""
        card = self.folder / _FILES / CARD
        if not card.is_file() or (head := _HEAD.match(read_text(card, MAX_CARRIED_BYTES))) is None:
            return None
        named = _LICENCE.search(head[0])
        return None if named is None else named[1]

    def copy_files(self, into: Path, only: Collection[str] | None = None, leave_out: Collection[str] = ()) -> None:
        """Writes the carried files. Raises OSError."""
        for file in self.files():
            if (only is None or str(file) in only) and str(file) not in leave_out:
                (into / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / _FILES / file, into / file)


def reading_of(checkpoint: Path, config: Config) -> dict[str, Any]:
    """Facts of a model beside its weights: while a checkpoint says the same as its origin, the origin's files fit it.

    Args:
        checkpoint: which holds tokenizer/, language/ and vision/.
        config: its recipe.

    Raises:
        ConfigError: one of these cannot be read.
    """
    parts = {part: settings_of(config_from_path(part, str(checkpoint / part))) for part in ("language", "vision")}
    for settings in parts.values():
        for key in _BESIDE_THE_MODEL:
            settings.pop(key, None)
    reading = {
        **parts,
        "pixels": read_json(checkpoint / "vision" / "preprocessor_config.json"),
        "select_layer": config.model.vision.select_layer,
        "select_feature": config.model.vision.select_feature,
        "projector": config.model.projector.type,
        "template": config.data.template,
        "template_arguments": config.data.template_arguments,
        "image_mode": config.data.image_mode,
        "image_token": config.data.image_token,
        "tokenizer": _tokenizer_digest(checkpoint / "tokenizer", config.data.image_token),
    }
    plain: dict[str, Any] = json.loads(json.dumps(reading, default=str))
    return plain


def _tokenizer_digest(folder: Path, image_token: str) -> str:
    """SHA-256 of what a tokenizer does, however its files are laid out."""
    tokenizer = load_tokenizer(folder, image_token)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in _OF_A_CALL:
        backend.pop(key, None)
    whole = [backend, {key: str(token) for key, token in tokenizer.special_tokens_map.items()}, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def write_origin(checkpoint: Path, foreign: ForeignModel, spare: Iterable[str], config: Config) -> None:
    """Keeps what an export needs to give the directory back.

    Args:
        checkpoint: which is being written; it has tokenizer/, language/ and vision/ already.
        spare: canonical names of tensors that no model here has.
        config: the checkpoint's recipe.

    Raises:
        OSError: the disk.
    """
    own, folder = foreign.own, checkpoint / FOLDER
    (folder / _HEADERS).mkdir(parents=True)
    record: dict[str, Any] = {"format": foreign.format, "weights": {}, "referenced": {}}
    record["reading"] = reading_of(checkpoint, config)
    if own is None:
        _copy_tokenizer(foreign.tokenizer, folder / _FILES)
    else:
        record["weights"] = _weights_of(own, folder / _HEADERS)
        elsewhere = sorted(set(foreign.source.names()) - set(own.names()))
        record["referenced"] = {name: reference_to(foreign.source.read(name)) for name in elsewhere}
        kept = {name: foreign.source.read(name).clone() for name in spare if name in own.names()}
        if kept:
            save_file(kept, folder / _SPARE)
        _copy_files(foreign, {file.path for file in own.weights.files}, folder / _FILES)
    (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")


def _weights_of(own: FolderSource, headers: Path) -> dict[str, list[list[Any]]]:
    """Tensors by weight file; writes the headers. Raises OSError."""
    canonical = {disk_name: name for name, disk_name in own.disk_names.items()}
    weights: dict[str, list[list[Any]]] = {}
    for file in own.weights.files:
        if isinstance(file, SafetensorsFile):
            (headers / file.path.name).write_bytes(file.header)
        tensors = [(name, file.read(name)) for name in file.names()]
        weights[file.path.name] = [[name, canonical[name], _name(t.dtype), [*t.shape]] for name, t in tensors]
    return weights


def copy_origin(start: Path, checkpoint: Path) -> None:
    """Gives a checkpoint that is being written the origin of the one its weights come from: what its manifest
    lists. Raises OSError, CheckpointError."""
    for name in Manifest.read(start).files:
        if name.startswith(f"{FOLDER}/"):
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(start / name, checkpoint / name)


def reference_to(tensor: Tensor) -> tuple[str, str, str]:
    """The reference by which `is_as_referenced` knows a tensor again."""
    return _name(tensor.dtype), _digest(tensor), _digest(tensor.bfloat16())


def is_as_referenced(tensor: Tensor, reference: tuple[str, str, str]) -> bool:
    """Whether it is what was imported, in the dtype it is stored in: bf16, or one that loses nothing."""
    dtype, sha256, sha256_bf16 = reference
    if tensor.dtype is torch.bfloat16:
        return _digest(tensor) == sha256_bf16
    own = tensor.to(getattr(torch, dtype))
    return _digest(own) == sha256 and torch.equal(own.to(tensor.dtype), tensor)


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _copy_files(foreign: ForeignModel, weights: Collection[Path], into: Path) -> None:
    """`weights`: the files whose tensors are in the checkpoint. Raises OSError."""
    folder = foreign.folder
    tower = None if foreign.vision_path is None else foreign.vision_path.resolve()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts) or path in weights:
            continue
        parents = [(folder / parent).resolve() for parent in inside.parents]  # up to the model's own directory
        is_weights = path.suffix in WEIGHT_SUFFIXES
        is_towers = is_weights and tower in parents[:-1]
        if is_weights and not is_towers:
            logger.warning("%s is left out: weights that are no part of the model as it was read", path)
            continue
        if path.stat().st_size > MAX_CARRIED_BYTES and not is_towers:
            logger.warning("%s is left out: %d bytes, more than %d", path, path.stat().st_size, MAX_CARRIED_BYTES)
            continue
        (into / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into / inside)


def _copy_tokenizer(folder: Path, into: Path) -> None:
    """Copies, for a model put together from several directories, the one file that a tokenizer does not write again."""
    if (folder / SENTENCEPIECE_FILE).is_file():
        into.mkdir(parents=True)
        shutil.copyfile(folder / SENTENCEPIECE_FILE, into / SENTENCEPIECE_FILE)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
