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
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.formats.base import ForeignModel
from megatron_vlm.conversion.formats.recipe import settings_of
from megatron_vlm.conversion.transfer.origin_record import FILES, FOLDER, HEADERS, MAX_CARRIED_BYTES, RECORD_FILE, SPARE
from megatron_vlm.conversion.weights.files import SafetensorsFile
from megatron_vlm.conversion.weights.sources import FolderSource
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.vision.pixels import kept_settings
from megatron_vlm.runtime.logging import get_logger

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE")
SENTENCEPIECE_FILE = "tokenizer.model"  # which transformers 5 does not write, and the original LLaVA reads
_ASKED = ("template", "template_arguments")
_BESIDE_THE_MODEL = ("architectures", "dtype", "_name_or_path")  # of a config: what made it, and how it is stored
_OF_A_CALL = ("padding", "truncation")  # what a tokenizer keeps of its last use

logger = get_logger(__name__)


def reading_of(checkpoint: Path, config: Config, model: ModelDescription, pixels: dict[str, Any]) -> dict[str, Any]:
    """Facts of a model beside its weights: while a checkpoint says the same as its origin, the origin's files fit it.

    Args:
        checkpoint: which holds tokenizer/.
        config: its recipe.
        model: its description.
        pixels: its preprocessor config.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """
    parts = {"language": settings_of(model.language), "vision": settings_of(model.survey.hf_config)}
    for settings in parts.values():
        for key in _BESIDE_THE_MODEL:
            settings.pop(key, None)
    reading = {
        **parts,
        "pixels": pixels,
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


def write_origin(
    checkpoint: Path, foreign: ForeignModel, spare: Iterable[str], config: Config, model: ModelDescription
) -> None:
    """Keeps what an export needs to give the directory back.

    Args:
        checkpoint: which is being written; it has tokenizer/ already.
        spare: canonical names of tensors that no model here has.
        config: the checkpoint's recipe.
        model: its description.

    Raises:
        OSError: the disk.
    """
    own, folder = foreign.own, checkpoint / FOLDER
    (folder / HEADERS).mkdir(parents=True)
    record: dict[str, Any] = {"format": foreign.format, "weights": {}, "referenced": {}}
    pixels = kept_settings(model.media_spec, config.data.image_mode)
    record["reading"] = reading_of(checkpoint, config, model.as_saved(), pixels)
    if own is None:
        _copy_tokenizer(foreign.tokenizer, folder / FILES)
    else:
        record["weights"] = _weights_of(own, folder / HEADERS)
        elsewhere = sorted(set(foreign.source.names()) - set(own.names()))
        record["referenced"] = {name: reference_to(foreign.source.read(name)) for name in elsewhere}
        kept = {name: foreign.source.read(name).clone() for name in spare if name in own.names()}
        if kept:
            save_file(kept, folder / SPARE)
        _copy_files(foreign, {file.path for file in own.weights.files}, folder / FILES)
    (folder / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")


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
