"""Description of a model directory of somebody else, told from its headers and configs."""

from pathlib import Path

from torch import Tensor

from megatron_vlm.conversion.formats import llava
from megatron_vlm.conversion.formats.base import FORMATS, ExternalParts, ModelFolder, open_foreign
from megatron_vlm.conversion.transfer.inspected import Inspection, count_parts
from megatron_vlm.conversion.weights.files import WeightFolder
from megatron_vlm.conversion.weights.sources import FolderSource, vision_rename

_PARTS = {"vision_tower": "vision", "multi_modal_projector": "projector"}  # by the canonical name's head


def inspect_foreign(folder: Path) -> Inspection:
    """Looks at a directory that is no checkpoint of ours. Raises as `inspection.inspect`."""
    found = ModelFolder.of(folder)
    return _other(found) if found.format is None else _foreign(found, found.format.name)


def _foreign(found: ModelFolder, format: str) -> Inspection:
    folder = found.path
    if format == llava.NAME and (tower := llava.tower_elsewhere(found)) is not None:
        return _without_tower(folder, tower)
    left_open = found.left_open()
    said = {key: option.values[0] for key, option in left_open.items()}
    foreign = open_foreign(folder, external=ExternalParts(options=said), found=found)
    reads = ((name, foreign.source.read(name)) for name in foreign.source.names())
    tensors = ((_PARTS.get(name.partition(".")[0], "language"), *_told(t)) for name, t in reads)
    notes = [f"tower {foreign.vision.model_type}, language model {foreign.language.model_type}"]
    notes += [f"config.json leaves {key} open: {option.about}" for key, option in left_open.items()]
    if foreign.own is None or not any(name.startswith("vision_tower.") for name in foreign.own.names()):
        notes.append(f"the tower's weights are in {foreign.vision_path}")
    files = {} if foreign.own is None else _sizes(foreign.own.weights)
    family = FORMATS.get(foreign.format).families[0]
    return Inspection(folder, foreign.format, family, count_parts(tensors), files, tuple(notes))


def _without_tower(folder: Path, tower: str) -> Inspection:
    """A directory of LLaVA that names a hub id as its tower: nothing is fetched to look at it."""
    own = FolderSource(str(folder), lambda names: llava.canonical_name)
    reads = ((name, own.read(name)) for name in own.names())
    tensors = ((_PARTS.get(name.partition(".")[0], "language"), *_told(t)) for name, t in reads)
    notes = (f"the tower is not here: mm_vision_tower is {tower}",)
    family = FORMATS.get(llava.NAME).families[0]
    return Inspection(folder, llava.NAME, family, count_parts(tensors), _sizes(own.weights), notes)


def _other(found: ModelFolder) -> Inspection:
    """A directory of transformers that is half a pair, or nothing to us."""
    weights = WeightFolder(found.path)
    model_type = str(found.settings.get("model_type", "unknown"))
    rename = vision_rename(weights.places.keys())
    has_head = any(name.startswith(("model.", "lm_head.")) for name in weights.places)
    reads = ((name, weights.places[name].read(name)) for name in weights.places)
    tensors = (("language" if has_head or rename(name) is None else "vision", *_told(t)) for name, t in reads)
    return Inspection(found.path, "transformers", model_type, count_parts(tensors), _sizes(weights))


def _told(tensor: Tensor) -> tuple[int, str]:
    """Its number of elements and its dtype."""
    return tensor.numel(), str(tensor.dtype).removeprefix("torch.")


def _sizes(weights: WeightFolder) -> dict[str, int]:
    return {file.path.name: file.path.stat().st_size for file in weights.files}
