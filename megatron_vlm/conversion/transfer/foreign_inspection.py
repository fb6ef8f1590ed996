"""Description of a model directory of somebody else, told from its headers and configs.

Where the format can tell by these alone what is there, neither torch nor transformers is imported: that takes seconds,
and headers a moment. What only opening a model shows (settings that transformers refuses, a chat template that cannot
be rendered) is told where it is opened: by an import.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from megatron_vlm.conversion.formats import llava
from megatron_vlm.conversion.formats.base import FORMATS, ExternalParts, FolderLook, ModelFolder, open_foreign
from megatron_vlm.conversion.transfer.inspected import Inspection, count_parts
from megatron_vlm.conversion.weights.files import WeightFolder
from megatron_vlm.conversion.weights.sources import FolderSource, vision_rename

_PARTS = {"vision_tower": "vision", "multi_modal_projector": "projector"}  # by the canonical name's head


def inspect_foreign(folder: Path) -> Inspection:
    """Looks at a directory that is no checkpoint of ours. Raises as `inspection.inspect`."""
    found = ModelFolder.of(folder)
    if found.format is None:
        return _other(found)
    if found.format.name == llava.NAME and (tower := llava.tower_elsewhere(found)) is not None:
        return _without_tower(folder, tower)
    seen = None if found.format.look is None else found.format.look(found)
    return _opened(found) if seen is None else _seen(found, seen)


def _seen(found: ModelFolder, seen: FolderLook) -> Inspection:
    """Tells of it by its files alone."""
    assert found.format is not None
    notes = [f"tower {seen.tower}, language model {seen.language}", *_left_open(found)]
    if seen.tower_path is not None:
        notes.append(f"the tower's weights are in {seen.tower_path}")
    parts = count_parts(tensor for source in seen.sources for tensor in _tensors(source))
    family, files = found.format.families[0], _sizes(seen.sources[0].weights)
    return Inspection(found.path, found.format.name, family, parts, files, tuple(notes))


def _opened(found: ModelFolder) -> Inspection:
    """Opens it as an import does."""
    said = {key: option.values[0] for key, option in found.left_open().items()}
    foreign = open_foreign(found.path, external=ExternalParts(options=said), found=found)
    reads = ((name, foreign.source.read(name)) for name in foreign.source.names())
    tensors = ((_part(name), tensor.numel(), str(tensor.dtype).removeprefix("torch.")) for name, tensor in reads)
    notes = [f"tower {foreign.vision.model_type}, language model {foreign.language.model_type}", *_left_open(found)]
    if foreign.own is None or not any(name.startswith("vision_tower.") for name in foreign.own.names()):
        notes.append(f"the tower's weights are in {foreign.vision_path}")
    files = {} if foreign.own is None else _sizes(foreign.own.weights)
    family = FORMATS.get(foreign.format).families[0]
    return Inspection(found.path, foreign.format, family, count_parts(tensors), files, tuple(notes))


def _without_tower(folder: Path, tower: str) -> Inspection:
    """A directory of LLaVA that names a hub id as its tower: nothing is fetched to look at it."""
    own = FolderSource(str(folder), lambda names: llava.canonical_name)
    notes = (f"the tower is not here: mm_vision_tower is {tower}",)
    family = FORMATS.get(llava.NAME).families[0]
    return Inspection(folder, llava.NAME, family, count_parts(_tensors(own)), _sizes(own.weights), notes)


def _other(found: ModelFolder) -> Inspection:
    """A directory of transformers that is half a pair, or nothing to us."""
    weights = WeightFolder(found.path)
    model_type = str(found.settings.get("model_type", "unknown"))
    rename = vision_rename(weights.places.keys())
    has_head = any(name.startswith(("model.", "lm_head.")) for name in weights.places)
    entries = ((name, *file.dtype_and_shape(name)) for name, file in weights.places.items())
    tensors = (
        ("language" if has_head or rename(name) is None else "vision", prod(shape), dtype)
        for name, dtype, shape in entries
    )
    return Inspection(found.path, "transformers", model_type, count_parts(tensors), _sizes(weights))


def _tensors(source: FolderSource) -> Iterator[tuple[str, int, str]]:
    """(part, number of elements, dtype) of each."""
    for name in source.names():
        dtype, shape = source.dtype_and_shape(name)
        yield _part(name), prod(shape), dtype


def _part(name: str) -> str:
    return _PARTS.get(name.partition(".")[0], "language")


def _left_open(found: ModelFolder) -> Sequence[str]:
    return [f"config.json leaves {key} open: {option.about}" for key, option in found.left_open().items()]


def _sizes(weights: WeightFolder) -> dict[str, int]:
    return {file.path.name: file.path.stat().st_size for file in weights.files}
