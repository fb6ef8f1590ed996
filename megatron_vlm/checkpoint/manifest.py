"""manifest.json: what a checkpoint is, readable without torch: step, recipe and its hash, versions.

It is the last file written into a checkpoint, so a directory without one is not a checkpoint.
"""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError

FORMAT = 1
FILE_NAME = "manifest.json"


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
    versions: dict[str, str] = field(default_factory=installed_versions)
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Writes manifest.json into `directory`."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Raises CheckpointError where `directory` is no checkpoint, or of a format this version does not know."""
        file = directory / FILE_NAME
        if not file.is_file():
            raise CheckpointError(f"{directory} is not a checkpoint: it has no {FILE_NAME}")
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            if entries["format"] != FORMAT:  # first: another format may have other entries
                raise CheckpointError(f"{file}: format {entries['format']} found, this version reads format {FORMAT}")
            return Manifest(**entries)
        except CheckpointError:
            raise
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
