"""Files that are whole: brought to the disk and hashed when written, compared with the manifest before being read."""

import hashlib
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.checkpoint.manifest import FileRecord, Manifest
from megatron_vlm.errors import CheckpointError
from megatron_vlm.runtime.files import open_regular
from megatron_vlm.runtime.logging import get_logger

if TYPE_CHECKING:  # hashing needs no torch
    from torch.distributed import ProcessGroup

logger = get_logger(__name__)


def record_of(file: Path) -> FileRecord:
    """Size and hash of a file, its bytes brought to the disk. Raises OSError."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        return FileRecord(os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def records_of(directory: Path, files: Iterable[Path]) -> dict[str, FileRecord]:
    """The records of files by their path inside `directory`. Raises OSError."""
    return {str(file.relative_to(directory)): record_of(file) for file in files}


def write_at(handle: int, place: int, data: bytes | memoryview) -> None:
    """Writes all of it at that byte of the file. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(handle, rest, place)
        rest, place = rest[written:], place + written


def send_to_disk(handle: int, place: int, size_bytes: int) -> None:
    """Has the kernel begin to bring written bytes to the disk, which else is idle until much waits for the fsync.

    Hazard: each call costs milliseconds of every core, so it is for tens of megabytes at a time. Raises OSError.
    """
    os.posix_fadvise(handle, place, size_bytes, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    """Brings the names of the files in `directory` to the disk. Raises OSError."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(directory: Path, manifest: Manifest, world: "ProcessGroup") -> str | None:
    """The first file that is not what the manifest says, and why; None where all are. A collective call: the ranks
    share the reading, and all get the same answer. Where the manifest is of an earlier format, it is said."""
    from megatron_vlm.runtime.collectives import all_gather_objects

    if world.rank() == 0:
        _tell_what_it_lacks(directory, manifest)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))
    own = by_size[world.rank() :: world.size()]
    found = [f"{name} {why}" for name in own if (why := _damage(directory / name, manifest.files[name]))]
    return next((damage for of_rank in all_gather_objects(found, world) for damage in of_rank), None)


def refuse_damage(directory: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Raises CheckpointError for the first of these files (default: all) that is not what the manifest says."""
    if names is None:
        _tell_what_it_lacks(directory, manifest)
        names = manifest.files
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: _damage(directory / name, manifest.files[name]), names)
    for name, damage in zip(names, found, strict=True):
        if damage is not None:
            raise CheckpointError(f"{directory} is damaged: {Path(name).name} {damage}")


def refuse_unlisted(directory: Path, manifest: Manifest, parts: Iterable[str]) -> None:
    """Raises CheckpointError for a file that the manifest does not list in one of these directories, which are read as
    they are found. Hidden ones are not read, so they may be there, and any file may elsewhere."""
    for part in parts:
        for path in sorted((directory / part).rglob("*")):
            name = str(path.relative_to(directory))
            is_read = path.is_symlink() or not path.is_dir()
            if is_read and name not in manifest.files and not path.name.startswith("."):
                raise CheckpointError(
                    f"{directory} holds {name}, which its manifest does not list and which would be read with {part}/; "
                    "move it elsewhere"
                )


def _tell_what_it_lacks(directory: Path, manifest: Manifest) -> None:
    if manifest.lacks is not None:
        logger.warning(
            "checkpoint %s has a manifest that does not cover it all: %s; save it again", directory, manifest.lacks
        )


def _damage(file: Path, expected: FileRecord) -> str | None:
    try:
        size_bytes = file.stat().st_size
        if size_bytes != expected.size_bytes:
            return f"has {size_bytes} bytes, it was saved with {expected.size_bytes}"
        with open_regular(file) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected.sha256:
                return "is not what was saved: its SHA-256 differs from the manifest's"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return None
