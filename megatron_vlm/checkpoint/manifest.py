"""manifest.json: what a checkpoint is, readable without torch: step, recipe, layout, data, versions, and its files.

It is the last file written into a checkpoint, so a directory without one is not a checkpoint. It lists every other
file with size and SHA-256 (`sha256sum` shows the same), so that what a disk or a copy did to them can be found.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vlm.errors import CheckpointError

FORMAT = 2
FILE_NAME = "manifest.json"


class OtherFormatError(CheckpointError):
    """A whole checkpoint, but one that this version does not read."""


class FileRecord(NamedTuple):
    """What a file must be."""

    size_bytes: int
    sha256: str  # hexadecimal


def installed_versions() -> dict[str, str]:
    """The versions a checkpoint's bytes depend on."""
    return {name: version(name) for name in ("torch", "megatron-core", "transformers")}


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is."""

    step: int  # updates made
    config: dict[str, Any]  # the resolved recipe
    config_hash: str
    components: list[str]  # which optimizer states are inside: language, vision
    vocab_size: int  # of the language model, without padding
    layout: dict[str, int]  # ranks per axis, and model chunks per pipeline rank
    data_fingerprint: dict[str, int | str] | None  # of the training samples, `SampleIndex.fingerprint_of_contents`
    files: dict[str, FileRecord]  # by path inside the checkpoint; all but this one
    versions: dict[str, str] = field(default_factory=installed_versions)
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Writes manifest.json into `directory`, to the disk. Raises OSError."""
        with open(directory / FILE_NAME, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Raises CheckpointError where `directory` is no checkpoint; OtherFormatError, where it is one of a format
        that this version does not know."""
        file = directory / FILE_NAME
        if not file.is_file():
            raise CheckpointError(f"{directory} is not a checkpoint: it has no {FILE_NAME}")
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            if entries["format"] != FORMAT:  # first: another format may have other entries
                raise OtherFormatError(
                    f"{file}: format {entries['format']} found, this version reads format {FORMAT} only; load it "
                    f"with the version that saved it ({entries.get('versions')})"
                )
            entries["files"] = {name: FileRecord(*record) for name, record in entries["files"].items()}
            return Manifest(**entries)
        except CheckpointError:
            raise
        except (OSError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
