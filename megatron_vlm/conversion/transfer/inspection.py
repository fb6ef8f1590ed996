"""Description of a model directory, ours or anybody's, told from its headers and configs in a moment.

A checkpoint of ours is told of without torch, whose import alone takes longer than all the rest.
"""

from math import prod
from pathlib import Path

from megatron_vlm.checkpoint.directory import latest_of
from megatron_vlm.checkpoint.integrity import refuse_damage
from megatron_vlm.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_vlm.checkpoint.manifest import METADATA_FILE, Manifest
from megatron_vlm.checkpoint.model_sources import read_sources
from megatron_vlm.checkpoint.stored_entries import read_entries
from megatron_vlm.conversion.transfer.inspected import Inspection, count_parts
from megatron_vlm.conversion.transfer.origin_record import RECORD as ORIGIN
from megatron_vlm.conversion.transfer.origin_record import Origin
from megatron_vlm.errors import ConversionError

OURS = "megatron_vlm"


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
    from megatron_vlm.conversion.transfer.foreign_inspection import inspect_foreign

    return inspect_foreign(folder)


def _ours(folder: Path) -> Inspection:
    manifest = Manifest.read(folder)
    refuse_damage(folder, manifest, [name for name in (METADATA_FILE, ORIGIN) if name in manifest.files])
    stored = read_entries(folder, manifest.files).entries
    tensors = (
        (name.partition(".")[0], prod(entry.size), entry.dtype)
        for name, entry in stored.items()
        if entry is not None and not name.startswith("optimizer")
    )
    origin = Origin.of(folder)
    states = ", ".join(manifest.components) or "none"
    notes = [f"step {manifest.step}, optimizer states: {states}, saved at {manifest.layout}"]
    notes += [f"imported from {origin.format}"] if origin else []
    notes += [f"from {name}, commit {commit}" for name, commit in read_sources(folder, manifest.files).items()]
    files = {name: record.size_bytes for name, record in manifest.files.items() if name.endswith(".distcp")}
    return Inspection(folder, OURS, manifest.config["model"]["family"], count_parts(tensors), files, tuple(notes))
