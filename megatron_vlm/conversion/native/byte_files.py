"""Bytes from files to files that are hashed on the way, by pieces, in several threads at once; no torch here."""

import contextlib
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.conversion.weights.files import Span, file_version
from megatron_vlm.errors import ConversionError, one_line
from megatron_vlm.runtime.files import open_regular

_PIECE_BYTES = 16 * 2**20  # written at a time


class HashingFile:
    """A file that is hashed while it is written, past the page cache where the file system allows it.

    Filling the cache with what nobody reads again costs more than the disk: half of a whole import. Within the context
    it is written; `finish` brings it to the disk. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._set_direct(True)
        self._hash = hashlib.sha256()
        self._piece = memoryview(mmap.mmap(-1, _PIECE_BYTES))  # aligned, as such writes need it
        self._num_waiting = 0
        self.size_bytes = 0

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def write(self, data: bytes | memoryview) -> None:
        """All of it, though its end may wait for `finish`."""
        rest = memoryview(data).cast("B")
        while rest:
            space = self.space(len(rest))
            space[:] = rest[: len(space)]
            rest = rest[len(space) :]
            self.filled(len(space))

    def finish(self) -> FileRecord:
        """Brings it to the disk."""
        self._set_direct(False)  # the end is of any length
        self._write_waiting()
        os.fsync(self._handle)
        return FileRecord(self.size_bytes, self._hash.hexdigest())

    def space(self, num_wanted: int) -> memoryview:
        """Space for the next bytes, or as many of them as there is room for; then tell `filled`."""
        return self._piece[self._num_waiting : self._num_waiting + num_wanted]

    def filled(self, num_bytes: int) -> None:
        """They are there."""
        self._hash.update(self._piece[self._num_waiting : self._num_waiting + num_bytes])
        self._num_waiting += num_bytes
        self.size_bytes += num_bytes
        if self._num_waiting == _PIECE_BYTES:
            self._write_waiting()

    def _write_waiting(self) -> None:
        rest = self._piece[: self._num_waiting]
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        self._num_waiting = 0

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # EINVAL: a file system without it, as a memory disk
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)


class SourceFiles:
    """The files that one thread reads, each opened once.

    Raises ConversionError, naming the file, where one cannot be read or is not the version that was looked at.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def copy(self, span: Span, file: HashingFile) -> None:
        """Appends to a file. Raises OSError where that cannot be written."""
        place, end = span.start, span.start + span.num_bytes
        while place < end:
            num_read = self._read(span, place, file.space(end - place))
            file.filled(num_read)
            place += num_read

    def read(self, span: Span) -> bytearray:
        """All of them, in memory."""
        content = bytearray(span.num_bytes)
        place = 0
        while place < span.num_bytes:
            place += self._read(span, span.start + place, memoryview(content)[place:])
        return content

    def _read(self, span: Span, place: int, into: memoryview) -> int:
        with _told_as_source(span.path):
            num_read = os.preadv(self._handle(span), [into], place)
            if num_read == 0:
                raise OSError(f"it ends at byte {place}, before the last tensor does")
            return num_read

    def _handle(self, span: Span) -> int:
        if span.path not in self._files:
            self._files[span.path] = open_regular(span.path)
            if file_version(self._files[span.path].fileno()) != span.version:
                raise OSError("it has changed since it was first looked at")
        return self._files[span.path].fileno()


@contextlib.contextmanager
def _told_as_source(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
