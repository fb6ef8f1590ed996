"""A PNG file without its notes: what is no part of the image is not shown to Pillow.

Pillow unpacks a PNG's texts and colour profile when it opens the file, and refuses the file where one of them is larger
than a limit of its own (1 MiB), unpacked with a method it does not know, or has a wrong checksum. Generators write
their whole workflow there, and printers' profiles are as large. Nothing of the pixels hangs on either, so they are cut
out before Pillow reads: nothing is unpacked, whatever its size.

Hazard: Pillow's limits (`PngImagePlugin.MAX_TEXT_CHUNK` and others) are settings of the whole process. To raise them,
even for a moment, would change what other code in it reads; so they are left as they are.
"""

import io
import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, BinaryIO

MAGIC = b"\x89PNG\r\n\x1a\n"
NOTES = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_AROUND_BYTES = 12  # of a chunk: its data's length and its kind before, its checksum behind


def without_notes(file: BinaryIO) -> BinaryIO:
    """The file as it is, or a view of it, of the same life, where it is a PNG with notes. Either is at its beginning.

    A chunk that does not end within the file is left for the reader to judge, with all behind it.
    """
    pieces = _list_pieces(file) if file.read(len(MAGIC)) == MAGIC else []
    file.seek(0)
    return io.BufferedReader(_Pieces(file, pieces)) if len(pieces) > 1 else file


def _list_pieces(file: BinaryIO) -> list[tuple[int, int]]:
    """Lists the pieces between the notes, [start, stop) in bytes."""
    pieces: list[tuple[int, int]] = []
    size = file.seek(0, io.SEEK_END)
    start, position, kind = 0, len(MAGIC), b""
    while kind != b"IEND" and position < size:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            break
        num_bytes, kind = struct.unpack(">I4s", head)
        end = position + num_bytes + _AROUND_BYTES
        if kind in NOTES and end <= size:
            pieces += [(start, position)] if start < position else []
            start = end
        position = end
    return [*pieces, (start, size)]


class _Pieces(io.RawIOBase):
    """Pieces of a file, at least one, read as one file."""

    def __init__(self, file: BinaryIO, pieces: Sequence[tuple[int, int]]) -> None:
        self.file, self.pieces = file, pieces
        *self.offsets, self.size = accumulate((stop - start for start, stop in pieces), initial=0)  # in this one
        self.position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seeks like a file."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        """Reads like a file; no more than up to the piece's end."""
        if self.position >= self.size:
            return 0
        number = bisect_right(self.offsets, self.position) - 1
        start, stop = self.pieces[number]
        place = start + self.position - self.offsets[number]
        self.file.seek(place)
        data = self.file.read(min(len(buffer), stop - place))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
