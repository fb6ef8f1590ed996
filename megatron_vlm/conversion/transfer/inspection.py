"""Description of a model directory, ours or anybody's, told from its headers and configs in a moment."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vlm.checkpoint.directory import latest_of
from megatron_vlm.checkpoint.integrity import refuse_damage
from megatron_vlm.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_vlm.checkpoint.manifest import METADATA_FILE, Manifest
from megatron_vlm.checkpoint.model_sources import read_sources
from megatron_vlm.checkpoint.stored_metadata import read_metadata
from megatron_vlm.conversion.formats import llava
from megatron_vlm.conversion.formats.base import (
    FORMATS,
    Places,
    is_foreign,
    open_foreign,
    open_options,
    read_json,
    recognised,
)
from megatron_vlm.conversion.transfer.origin import RECORD as ORIGIN
from megatron_vlm.conversion.transfer.origin import Origin
from megatron_vlm.conversion.weights.files import WeightFolder
from megatron_vlm.conversion.weights.sources import FolderSource, vision_rename
from megatron_vlm.errors import ConversionError

OURS = "megatron_vlm"
_PARTS = {"vision_tower": "vision", "multi_modal_projector": "projector"}  # by the canonical name's head


@dataclass(frozen=True)
class PartFacts:
    """A part of a model: how many parameters of which dtypes."""

    num_parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A directory.

    Args:
        format: registered name, `megatron_vlm`, or `transformers` for a model of another kind.
        family: of the product's models, or the model type where it is none of them.
        parts: by name: language, vision, projector.
        files: weight files with their size in bytes.
        notes: what else is worth knowing, in sentences.
    """

    path: Path
    format: str
    family: str
    parts: dict[str, PartFacts]
    files: dict[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = sum(part.num_parameters for part in self.parts.values())
        lines = [f"{self.path}: format {self.format}, family {self.family}, {total:,} parameters"]
        lines += [f"  {name:10} {p.num_parameters:>15,}  {', '.join(p.dtypes)}" for name, p in self.parts.items()]
        lines += [f"  {name}  {size:,} bytes" for name, size in self.files.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def inspect(path: str | Path) -> Inspection:
    """Looks at a directory; no tensor is read.

    Raises:
        ConversionError, CheckpointError, ConfigError: nothing there that holds weights, or something damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such directory")
    folder = latest_of(folder) or folder
    if (folder / MANIFEST).exists():
        return _ours(folder)
    return _foreign(folder) if is_foreign(folder) else _other(folder)


def _ours(folder: Path) -> Inspection:
    manifest = Manifest.read(folder)
    refuse_damage(folder, manifest, [name for name in (METADATA_FILE, ORIGIN) if name in manifest.files])
    stored = read_metadata(folder, manifest.files).state_dict_metadata
    tensors = (
        (name.partition(".")[0], place.size.numel(), place.properties.dtype)
        for name, place in stored.items()
        if isinstance(place, TensorStorageMetadata) and not name.startswith("optimizer")
    )
    origin = Origin.of(folder)
    states = ", ".join(manifest.components) or "none"
    notes = [f"step {manifest.step}, optimizer states: {states}, saved at {manifest.layout}"]
    notes += [f"imported from {origin.format}"] if origin else []
    notes += [f"from {name}, commit {commit}" for name, commit in read_sources(folder, manifest.files).items()]
    files = {name: record.size_bytes for name, record in manifest.files.items() if name.endswith(".distcp")}
    return Inspection(folder, OURS, manifest.config["model"]["family"], _parts(tensors), files, tuple(notes))


def _foreign(folder: Path) -> Inspection:
    if recognised(folder) == llava.NAME and (tower := llava.tower_elsewhere(folder)) is not None:
        return _without_tower(folder, tower)
    left_open = open_options(folder)
    said = {key: option.values[0] for key, option in left_open.items()}
    foreign = open_foreign(folder, places=Places(options=said))
    reads = ((name, foreign.source.read(name)) for name in foreign.source.names())
    tensors = ((_PARTS.get(name.partition(".")[0], "language"), t.numel(), t.dtype) for name, t in reads)
    notes = [f"tower {foreign.vision.model_type}, language model {foreign.language.model_type}"]
    notes += [f"config.json leaves {key} open: {option.about}" for key, option in left_open.items()]
    if foreign.own is None or not any(name.startswith("vision_tower.") for name in foreign.own.names()):
        notes.append(f"the tower's weights are in {foreign.vision_path}")
    files = {} if foreign.own is None else _sizes(foreign.own.weights)
    family = FORMATS.get(foreign.format).families[0]
    return Inspection(folder, foreign.format, family, _parts(tensors), files, tuple(notes))


def _without_tower(folder: Path, tower: str) -> Inspection:
    """A directory of LLaVA that names a hub id as its tower: nothing is fetched to look at it."""
    own = FolderSource(str(folder), lambda names: llava.canonical_name)
    reads = ((name, own.read(name)) for name in own.names())
    tensors = ((_PARTS.get(name.partition(".")[0], "language"), t.numel(), t.dtype) for name, t in reads)
    notes = (f"the tower is not here: mm_vision_tower is {tower}",)
    family = FORMATS.get(llava.NAME).families[0]
    return Inspection(folder, llava.NAME, family, _parts(tensors), _sizes(own.weights), notes)


def _other(folder: Path) -> Inspection:
    """A directory of transformers that is half a pair, or nothing to us."""
    weights = WeightFolder(folder)
    config = folder / "config.json"
    model_type = str(read_json(config).get("model_type", "unknown")) if config.is_file() else "unknown"
    rename = vision_rename(weights.places.keys())
    has_head = any(name.startswith(("model.", "lm_head.")) for name in weights.places)
    reads = ((name, weights.places[name].read(name)) for name in weights.places)
    tensors = (("language" if has_head or rename(name) is None else "vision", t.numel(), t.dtype) for name, t in reads)
    return Inspection(folder, "transformers", model_type, _parts(tensors), _sizes(weights))


def _parts(tensors: Iterable[tuple[str, int, torch.dtype]]) -> dict[str, PartFacts]:
    numbers: dict[str, int] = defaultdict(int)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for part, number, dtype in tensors:
        numbers[part] += number
        dtypes[part].add(str(dtype).removeprefix("torch."))
    return {part: PartFacts(numbers[part], tuple(sorted(dtypes[part]))) for part in sorted(numbers)}


def _sizes(weights: WeightFolder) -> dict[str, int]:
    return {file.path.name: file.path.stat().st_size for file in weights.files}
