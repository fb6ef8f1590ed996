"""manifest.json: what a checkpoint is, readable without torch: step, recipe, layout, data, versions, and its files.

    {"step": 100, "config": {...}, ..., "files": {"common.pt": [1234, "9f86d0..."], ...}, "format": 3,
     "sha256": "..."
    }

It is the last file written into a checkpoint, so a directory without one is not a checkpoint. It lists every other
file with size and SHA-256 (`sha256sum` shows the same), so that what a disk or a copy did to them can be found; what it
does not list is not read. Its own last lines are the SHA-256 of all bytes before them, so every byte is covered.

Hazard: that is no signature: who writes a checkpoint writes its manifest too. What it says is therefore taken for what
anybody may have written: every entry has its type, and every name of a file is one below the directory.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vlm.errors import CheckpointError, one_line, shown
from megatron_vlm.runtime.files import parse_json, read_bytes, stays_inside

FORMAT = 3
READS = (2, FORMAT)  # 2: the same without a checksum of itself
FILE_NAME = "manifest.json"
METADATA_FILE, COMMON_FILE, BACKENDS_FILE = ".metadata", "common.pt", "metadata.json"  # torch's and megatron-core's
ALWAYS_THERE = (METADATA_FILE, COMMON_FILE, BACKENDS_FILE)
MAX_BYTES = 1 << 26  # of a manifest: a file that it lists takes about a hundred
MAX_COUNT = 1 << 53  # what any reader of JSON holds exactly
_STEP_NAME = re.compile(r"(?:\.replaced_)?step_([0-9]{7,})", re.ASCII)  # as `directory` names them
_SEAL = b' "sha256": "'


class OtherFormatError(CheckpointError):
    """A whole checkpoint, but one that this version does not read."""


class FileRecord(NamedTuple):
    """Size and checksum that a file must have."""

    size_bytes: int
    sha256: str  # hexadecimal


def installed_versions() -> dict[str, str]:
    """The versions a checkpoint's bytes depend on."""
    return {name: version(name) for name in ("torch", "megatron-core", "transformers")}


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint: its recipe, versions and files."""

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
        entries = asdict(self) | {"format": FORMAT}
        content = json.dumps(entries, indent=1).encode().removesuffix(b"\n}") + b",\n"
        with open(directory / FILE_NAME, "wb") as file:
            file.write(content + _seal(content))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Raises CheckpointError where `directory` is no checkpoint, or its manifest is not what was written;
        OtherFormatError, where it is one of a format that this version does not know."""
        file = directory / FILE_NAME
        if not os.path.lexists(file):
            raise CheckpointError(f"{directory} is not a checkpoint: it has no {FILE_NAME}")
        try:
            manifest = _parse(read_bytes(file, MAX_BYTES), file)
            manifest._check(directory)
            return manifest
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged: {one_line(error)}") from error

    @property
    def lacks(self) -> str | None:
        """Parts that a checkpoint of an earlier format lacks, in a line; None where it is of this one."""
        return None if self.format == FORMAT else f"it is of format {self.format}: damage to its manifest is not found"

    def _check(self, directory: Path) -> None:
        """Raises ValueError where the entries do not agree with one another, or with the directory's name."""
        from megatron_vlm.config.loading import hash_of_tree  # what writes a manifest needs none of it

        if found := [name for name in self.files if not stays_inside(name) or name == FILE_NAME]:
            raise ValueError(f"files: found {found[0]!r}, needs the path of a file inside the checkpoint")
        if missing := [name for name in ALWAYS_THERE if name not in self.files]:
            raise ValueError(f"files: {missing[0]} is not listed, which every checkpoint has")
        named = _STEP_NAME.fullmatch(directory.name)
        if named is not None and named[1].lstrip("0") != str(self.step or ""):
            raise ValueError(f"step: found {self.step} in a directory called {directory.name}")
        if hash_of_tree(self.config) != self.config_hash:
            raise ValueError(f"config_hash: found {self.config_hash}, which is not the hash of config")


def _seal(content: bytes) -> bytes:
    """The end of a manifest whose beginning this is."""
    return _SEAL + hashlib.sha256(content).hexdigest().encode() + b'"\n}\n'


def _parse(data: bytes, file: Path) -> Manifest:
    """Raises ValueError for what is no manifest, OtherFormatError."""
    size = len(_seal(b""))
    is_sealed = data[-size:].startswith(_SEAL)
    if is_sealed and _seal(data[:-size]) != data[-size:]:
        raise ValueError("its own SHA-256, in its last lines, does not match its contents")
    entries = parse_json(data)
    if type(entries) is not dict:
        raise ValueError(f"found a {type(entries).__name__}, needs entries by name")
    if type(number := entries.get("format")) is not int:
        raise ValueError(f"format: found {_seen(number)}, needs {FORMAT}")
    if number not in READS:
        raise OtherFormatError(
            f"{file}: format {number} found, this version reads formats {' and '.join(map(str, READS))} only; load it "
            f"with the version that saved it ({_seen(entries.get('versions'))})"
        )
    if is_sealed != (number == FORMAT):
        raise ValueError(
            f"format: found {number} {'with' if is_sealed else 'without'} a checksum of its own at the end"
        )
    entries.pop("sha256", None)
    names = {entry.name for entry in fields(Manifest)}
    if other := sorted(entries.keys() ^ names):
        raise ValueError(f"{_seen(other[0])}: {'missing' if other[0] in names else 'an unknown entry'}")
    for name, (is_good, needed) in _TYPES.items():
        if not is_good(entries[name]):
            raise ValueError(f"{name}: found {_seen(entries[name])}, needs {needed}")
    files = {name: FileRecord(*record) for name, record in entries["files"].items()}
    return Manifest(**entries | {"files": files})


def _seen(value: Any) -> str:
    """A value that may be anything, in a few words."""
    if type(value) is dict:
        return f"{{{', '.join(f'{name}: {_seen(part)}' for name, part in value.items() if type(part) is str)}}}"[:200]
    return "a list" if type(value) is list else shown(repr(value))[:80]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_hex(length: int) -> Callable[[Any], bool]:
    form = re.compile(rf"[0-9a-f]{{{length}}}")
    return lambda value: type(value) is str and form.fullmatch(value) is not None


def _by_name(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(map(is_good, value.values()))


def _is_record(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_count(value[0]) and _is_hex(64)(value[1])


def _is_fingerprint(value: Any) -> bool:
    return value is None or _by_name(lambda part: _is_text(part) or _is_count(part))(value)


def _are_components(value: Any) -> bool:
    return type(value) is list and all(part in ("language", "vision") for part in value)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a whole number from 0"),
    "config": (lambda value: type(value) is dict, "a recipe"),
    "config_hash": (_is_hex(12), "12 hexadecimal digits"),
    "components": (_are_components, "a list of language and vision"),
    "vocab_size": (_is_size, "a number of tokens"),
    "layout": (_by_name(_is_size), "numbers of ranks by axis"),
    "data_fingerprint": (_is_fingerprint, "numbers and texts by name, or null"),
    "files": (_by_name(_is_record), "[bytes, SHA-256] by the path of a file"),
    "versions": (_by_name(_is_text), "versions by package"),
}
