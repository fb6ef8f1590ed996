"""Files of JSON objects: a list of them, or one per line (JSONL); which of them is told from the first character.

A file is scanned once for the place of every object, a window of it in memory; after that one object's bytes are read
and parsed at a time. The scan decodes a list as Latin-1, in which a character is a byte and JSON's own signs are what
they are in UTF-8: positions in the text are offsets in the file.

An image or video of a record may also be in it, as a data URI (`data:image/png;base64,...`), as OpenAI's chats have it.
"""

import base64
import binascii
import contextlib
import io
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vlm.data.sample import BadSample, Embedded, MediaRef, Member, RecordKey, Sample
from megatron_vlm.data.sources.base import Paths
from megatron_vlm.data.sources.files import FileSource
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.runtime.files import open_regular, parse_json

HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
BLANK = re.compile(r"[ \t\r\n]*")
BLANKS = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # UTF-8's
FIRST_BYTES = 2**22  # of a file, which hold its first records
WINDOW_BYTES = 2**24  # of a list
MAX_BYTES = 2**28  # of a record, far above one with its images in it; a file of anything may have no line break at all
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
ADDRESS = re.compile(r"(?:https?|s3|gs|ftp)://")
Place = tuple[int, int, int]  # offset, size, number


class JsonSource(FileSource):
    """JSON lists or JSONL, a record an object. A format derives from it and says what an object means."""

    suffixes = (".json", ".jsonl")

    def __init__(self, path: Paths, image_token: str, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, image_token, options)
        self._units: dict[int, str] = {}  # of files that were looked at
        self._opened: tuple[RecordKey, tuple[str, ...]] | None = None  # the last record of which media were opened

    @abstractmethod
    def parse_texts(self, raw: bytes, key: RecordKey) -> Sample:
        """An object's bytes -> its sample, with images and videos as the record writes them. Raises BadSample."""

    def parse(self, raw: bytes, key: RecordKey) -> Sample:
        """One object, its data URIs made references to it. Raises BadSample."""
        sample = self.parse_texts(raw, key)
        texts = [*map(str, sample.images), *map(str, sample.videos)]
        if not any(map(_begins_an_address, texts)):
            return sample
        found = [self._refer(text, key, number, sample.origin) for number, text in enumerate(texts)]
        return replace(sample, images=tuple(found[: len(sample.images)]), videos=tuple(found[len(sample.images) :]))

    def _refer(self, text: str, key: RecordKey, number: int, origin: str) -> MediaRef:
        if DATA_URI.match(text):
            return Embedded(tuple(key), number, f"{number} of {origin}")
        if ADDRESS.match(text):
            raise BadSample(f"{origin} names {text[:80]}, an address in the network; the path of a file is needed")
        return text.removeprefix("file://")

    def open(self, media: Member | Embedded) -> BinaryIO:
        """The bytes of a data URI. Raises DataError as `read`, BadSample: it is damaged."""
        if isinstance(media, Member):
            return super().open(media)
        if self._opened is None or self._opened[0] != media.record:  # its other images are most likely wanted next
            sample = self.parse_texts(self.read(media.record), media.record)
            self._opened = media.record, tuple(map(str, (*sample.images, *sample.videos)))
        uri = self._opened[1][media.number]
        try:
            return io.BytesIO(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
        except (binascii.Error, ValueError) as error:
            raise BadSample(f"{media} is not base64: {one_line(error)}", "damaged") from error

    def places(self, path: Path) -> Iterator[Place]:
        """The place of every object, in file order.

        Raises:
            DataError: the file cannot be read, is empty, or is not JSON.
        """
        place = None
        for place in (_scan_list if is_list(path) else _scan_lines)(path):
            yield place
        if place is None:
            raise DataError(f"{path} holds no conversation")

    def first_places(self, path: Path) -> Iterable[Place]:
        """The first records; of a large file only the beginning is read: `places` tells its faults."""
        if len(_beginning(path, FIRST_BYTES)) < FIRST_BYTES:
            return list(self.places(path))
        found: list[Place] = []
        with contextlib.suppress(DataError):  # most likely where it is cut
            for place in (_scan_list if is_list(path) else _scan_lines)(path, FIRST_BYTES):
                found.append(place)
        return found

    def unit_of(self, file: int) -> str:
        """Element of a list, or line."""
        if file not in self._units:
            self._units[file] = "element" if is_list(self.files[file]) else "line"
        return self._units[file]


def is_list(path: Path) -> bool:
    """Whether a file is one JSON list. Raises DataError where it cannot be read, or is UTF-16."""
    data = _beginning(path, 64)
    if data.startswith(UTF_16_MARKS):
        raise DataError(f"{path} is UTF-16; UTF-8 is needed")
    return data.removeprefix(BYTE_ORDER_MARK).lstrip(BLANKS).startswith(b"[")


def read_object(raw: bytes, origin: str) -> dict[str, Any]:
    """One JSON object. Raises BadSample."""
    try:
        record = parse_json(raw)
        if HALF_CHARACTER.search(raw):
            json.dumps(record, ensure_ascii=False).encode()  # it may be half of a pair, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)
        message = f"{origin} is not JSON: {reason}; a file holds one list of objects, or one whole object per line"
        raise BadSample(message) from error
    if not isinstance(record, dict):
        raise BadSample(f"{origin} is {type(record).__name__}; an object is needed")
    return record


def _begins_an_address(text: str) -> bool:
    return bool(text.startswith("file://") or DATA_URI.match(text) or ADDRESS.match(text))


def _beginning(path: Path, num_bytes: int) -> bytes:
    """Raises DataError."""
    try:
        with open_regular(path) as file:
            return file.read(num_bytes)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error


def _scan_lines(path: Path, num_bytes: int | None = None) -> Iterator[Place]:
    """Raises DataError where the file cannot be read, or a line has no end. `num_bytes`: of the file; default: all."""
    try:
        with open_regular(path) as file:
            end, is_first = 0, True
            for number, line in enumerate(iter(partial(file.readline, MAX_BYTES), b""), start=1):
                if len(line) == MAX_BYTES:
                    size, alone = path.stat().st_size, f"line {number} alone has {MAX_BYTES:,} or more"
                    raise DataError(
                        f"data file {path} has {size:,} bytes; to index it takes twice the memory ({alone})"
                    )
                start, end = end, end + len(line)
                if num_bytes is not None and end >= num_bytes:
                    return
                if number == 1 and line.startswith(BYTE_ORDER_MARK):
                    start, line = start + len(BYTE_ORDER_MARK), line[len(BYTE_ORDER_MARK) :]
                if not (whole := line.strip(BLANKS)):
                    continue
                if is_first:  # a list begins behind blanks too
                    start, is_first = start + line.index(whole[:1]), False
                yield start, end - start - line.endswith(b"\n"), number
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error


def _scan_list(path: Path, num_bytes: int | None = None) -> Iterator[Place]:
    """Raises DataError where it is not JSON. `num_bytes`: of the file; default: all."""
    try:
        with open_regular(path) as file:
            yield from _scan_elements(_ListText(path, file, num_bytes))
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error


def _scan_elements(text: "_ListText") -> Iterator[Place]:
    position = text.skip_blank(len(BYTE_ORDER_MARK) if text.begins_with_mark else 0)
    position = text.skip_blank(position + 1)  # just inside the opening bracket
    separator, number = ",", 0
    if text.character(position) == "]":
        separator, position = "]", text.skip_blank(position + 1)
    while separator == ",":
        end = text.end_of_element(position, number)
        yield position, end - position, number
        end = text.skip_blank(end)
        separator = text.character(end)
        if separator not in (",", "]"):
            raise DataError(f"{text.path} line {text.line(end)}: ',' or ']' is needed after element {number}")
        position = text.skip_blank(end + 1)
        number += 1
    if text.character(position):
        raise DataError(f"{text.path} line {text.line(position)}: nothing may follow the list's ']'")


class _ListText:
    """A list's file as text, of which a window is in memory, from byte `_base` on. Positions are bytes of the file.

    An element that ends where the window does may go on behind it; so it is read again with a window that begins with
    it, and then with larger ones.
    """

    def __init__(self, path: Path, file: BinaryIO, num_bytes: int | None) -> None:
        size = os.fstat(file.fileno()).st_size
        self.path, self._file = path, file
        self._size = size if num_bytes is None else min(size, num_bytes)
        self._decode = json.JSONDecoder().raw_decode
        self._base, self._text = 0, ""
        self._see(0, max(WINDOW_BYTES, len(BYTE_ORDER_MARK)))
        self.begins_with_mark = self._text.startswith(BYTE_ORDER_MARK.decode("latin-1"))

    def _see(self, position: int, num_bytes: int) -> None:
        data = os.pread(self._file.fileno(), min(num_bytes, self._size - position), position)
        self._base, self._text = position, data.decode("latin-1")

    def character(self, position: int) -> str:
        """The one there; behind the end the empty text."""
        if position >= self._size:
            return ""
        if not self._base <= position < self._base + len(self._text):
            self._see(position, WINDOW_BYTES)
        return self._text[position - self._base : position - self._base + 1]  # none where the file became shorter

    def skip_blank(self, position: int) -> int:
        """The next position that is not blank, or the file's end."""
        while self.character(position):
            found = BLANK.match(self._text, position - self._base)
            assert found is not None, "it matches the empty text too"
            position = self._base + found.end()
            if found.end() < len(self._text):
                return position
        return position

    def end_of_element(self, position: int, number: int) -> int:
        """Reads the element that begins there. Raises DataError."""
        self.character(position)
        while True:
            last = self._base + len(self._text) >= self._size or len(self._text) >= MAX_BYTES
            try:
                _, end = self._decode(self._text, position - self._base)
                if end < len(self._text) or last:
                    return self._base + end
            except (ValueError, RecursionError) as error:
                if last or isinstance(error, RecursionError):
                    place, reason = position, str(error)
                    if isinstance(error, json.JSONDecodeError):
                        place, reason = self._base + error.pos, error.msg
                    where = f"line {self.line(place)}, byte {place}"
                    raise DataError(f"{self.path} element {number} is not JSON: {reason} ({where})") from error
            self._see(position, WINDOW_BYTES if position > self._base else 2 * len(self._text))

    def line(self, position: int) -> int:
        """The line of a position, from 1."""
        starts = range(0, position, WINDOW_BYTES)
        pieces = (os.pread(self._file.fileno(), min(WINDOW_BYTES, position - start), start) for start in starts)
        return 1 + sum(piece.count(b"\n") for piece in pieces)
