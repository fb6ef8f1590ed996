"""One rule for files that are read: regular ones, or the error says what else was found.

A FIFO, a socket or a device in a file's place would block a run for ever or feed it without end, so a path of anybody
is opened by `open_regular`, or checked by `check_regular` where a library opens it itself. Every fault is an OSError,
also a name that no file can have and text that is not UTF-8.
"""

import errno
import io
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 1 << 30  # of a file that is read as one text: far above any real one, far below the memory
PIECE_BYTES = 1 << 20

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


class FileKindError(OSError):
    """Something else stands where a regular file is needed, or the name is none that a file can have."""


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file for reading, in bytes; never waits for a writer.

    Raises:
        OSError: it cannot be opened; FileKindError: it is no regular file.
    """
    check_regular(path)  # before: to open some devices has an effect
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_other(os.fstat(handle).st_mode, path)  # after: it may have been changed meanwhile
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


class FilePart(io.RawIOBase):
    """Bytes of a regular file, read as a file of their own: a member of an archive. Closes the file with itself."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        """`offset`, `size`: in bytes; what is beyond the file's end is not there."""
        self._file, self._offset = file, offset
        self._size = max(0, min(size, os.fstat(file.fileno()).st_size - offset))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise OSError(errno.EINVAL, "no place before the beginning can be read")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._file.fileno(), size, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_part(path: str | os.PathLike[str], offset: int, size: int) -> io.BufferedReader:
    """Opens `size` bytes from `offset` of a regular file as a file of their own. Raises OSError as `open_regular`."""
    return io.BufferedReader(FilePart(open_regular(path), offset, size))


def check_regular(path: str | os.PathLike[str], or_directory: bool = False) -> os.stat_result:
    """Returns `os.stat` of a regular file, links followed.

    Args:
        path: the file.
        or_directory: a directory is good too.

    Raises:
        OSError: it is not there; FileKindError: it is something else.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a null character, half a surrogate
        raise FileKindError(errno.EINVAL, f"is not a valid file name ({error})", os.fspath(path)) from error
    if not (or_directory and stat.S_ISDIR(found.st_mode)):
        _refuse_other(found.st_mode, path)
    return found


def read_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All bytes of a regular file. Raises OSError, also where there are more than `max_bytes`."""
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data = file.read(min(size_bytes, max_bytes + 1))  # room for all that is asked for is made first
        while len(data) <= max_bytes and (more := file.read(PIECE_BYTES)):  # /proc tells no sizes
            data += more
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than the {max_bytes:,} bytes that are allowed", os.fspath(path))
    return data


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A regular file as UTF-8 text. Raises OSError, also where it is not UTF-8 or has more than `max_bytes`."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"is not UTF-8 text (byte {error.start})", os.fspath(path)) from error


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Reads a JSON file. Raises OSError, ValueError: it is not JSON."""
    return parse_json(read_text(path, max_bytes))


def parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """Parses a JSON text; bytes are UTF-8 and nothing else.

    Args:
        unique_keys: refuse an object that has a key twice; else the last of them counts.

    Raises:
        ValueError: it is not JSON, or nests deeper than Python reads; UnicodeDecodeError among them.
    """
    try:
        # `json.loads` would guess an encoding, and let halves of surrogates pass
        whole = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(whole, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError("its JSON nests too deep to be read") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has {twice!r} twice")
    return found


def can_be_a_name(name: str) -> bool:
    """Whether a file can have the name: it is not empty, has no null character and no half of a surrogate."""
    try:
        return bool(name.encode("utf-8")) and "\0" not in name
    except UnicodeEncodeError:
        return False


def stays_inside(name: object) -> bool:
    """Whether a name is a relative path below its folder, written in the one way `Path` writes it."""
    if not isinstance(name, str) or not can_be_a_name(name):
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != () and str(path) == name


def _refuse_other(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise FileKindError(errno.EINVAL, f"is {what}, a regular file is needed", os.fspath(path))
