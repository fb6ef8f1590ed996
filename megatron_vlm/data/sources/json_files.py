"""Files of JSON objects: a list of them, or one per line (JSONL); which of them is told from the first character.

A file is scanned once for the place of every object; after that one object's bytes are read and parsed at a time. Lines
are scanned as they are read; a list of gigabytes costs its memory once, at indexing, and never in a worker. The scan
decodes a list as Latin-1, in which a character is a byte and JSON's own signs are what they are in UTF-8: positions in
the text are offsets in the file.

An image or video of a record may also be in it, as a data URI (`data:image/png;base64,...`), as OpenAI's chats have it.
"""

import base64
import binascii
import contextlib
import io
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
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
MAX_LINE_BYTES = 2**28  # far above a record with its images in it; a file of anything may have no line break at all
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
        sample = self.parse_texts(self.read(media.record), media.record)
        uri = str([*sample.images, *sample.videos][media.number])
        try:
            return io.BytesIO(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
        except (binascii.Error, ValueError) as error:
            raise BadSample(f"{media} is no base64: {one_line(error)}", "damaged") from error

    def places(self, path: Path) -> Iterator[Place]:
        """The place of every object, in file order.

        Raises:
            DataError: the file cannot be read, is empty, or is not JSON.
        """
        place = None
        for place in _scan_list(path, _read(path)) if is_list(path) else _scan_lines(path):
            yield place
        if place is None:
            raise DataError(f"{path} holds no conversation")

    def first_places(self, path: Path) -> Iterable[Place]:
        """The first records; of a large file only the beginning is read: `places` tells its faults."""
        data = _read(path, FIRST_BYTES)
        if len(data) < FIRST_BYTES:
            return list(self.places(path))
        found: list[Place] = []
        with contextlib.suppress(DataError):  # most likely where it is cut
            places = _scan_list(path, data) if is_list(path) else _scan_lines(path)
            found += takewhile(lambda place: place[0] + place[1] < len(data), places)
        return found

    def unit_of(self, file: int) -> str:
        """Element of a list, or line."""
        if file not in self._units:
            self._units[file] = "element" if is_list(self.files[file]) else "line"
        return self._units[file]


def is_list(path: Path) -> bool:
    """Whether a file is one JSON list. Raises DataError where it cannot be read, or is UTF-16."""
    data = _read(path, 64)
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


def _read(path: Path, num_bytes: int = -1) -> bytes:
    """The file's beginning, by default all of it. Raises DataError."""
    try:
        with open_regular(path) as file:
            return file.read(num_bytes)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise _too_large(path) from error


def _too_large(path: Path, more: str = "") -> DataError:
    return DataError(f"data file {path} has {path.stat().st_size:,} bytes; to index it takes twice the memory{more}")


def _skip_blank(text: str, position: int) -> int:
    found = BLANK.match(text, position)
    assert found is not None, "it matches the empty text too"
    return found.end()


def _scan_lines(path: Path) -> Iterator[Place]:
    """Raises DataError where the file cannot be read."""
    try:
        with open_regular(path) as file:
            end, is_first = 0, True
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES), b""), start=1):
                if len(line) == MAX_LINE_BYTES:
                    raise _too_large(path, f" (line {number} alone has {MAX_LINE_BYTES:,} or more)")
                start, end = end, end + len(line)
                if number == 1 and line.startswith(BYTE_ORDER_MARK):
                    start, line = start + len(BYTE_ORDER_MARK), line[len(BYTE_ORDER_MARK) :]
                if not (whole := line.strip(BLANKS)):
                    continue
                if is_first:  # a list begins behind blanks too
                    start, is_first = start + line.index(whole[:1]), False
                yield start, end - start - line.endswith(b"\n"), number
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise _too_large(path) from error


def _scan_list(path: Path, data: bytes) -> Iterator[Place]:
    """Raises DataError where it is not JSON."""
    decode = json.JSONDecoder().raw_decode
    try:
        text = data.decode("latin-1")
    except MemoryError as error:
        raise _too_large(path) from error
    del data  # a caller's may stay; of a whole file there is none
    mark = len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK.decode("latin-1")) else 0
    position = _skip_blank(text, _skip_blank(text, mark) + 1)  # just inside the opening bracket
    separator, number = ",", 0
    if text[position : position + 1] == "]":
        separator, position = "]", _skip_blank(text, position + 1)
    while separator == ",":
        try:
            _, end = decode(text, position)
        except (ValueError, RecursionError) as error:
            place, reason = (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (position, error)
            where = f"line {text.count(chr(10), 0, place) + 1}, byte {place}"
            raise DataError(f"{path} element {number} is not JSON: {reason} ({where})") from error
        yield position, end - position, number
        end = _skip_blank(text, end)
        separator = text[end : end + 1]
        if separator not in (",", "]"):
            line = text.count("\n", 0, end) + 1
            raise DataError(f"{path} line {line}: ',' or ']' is needed after element {number}")
        position = _skip_blank(text, end + 1)
        number += 1
    if position < len(text):
        line = text.count("\n", 0, position) + 1
        raise DataError(f"{path} line {line}: nothing may follow the list's ']'")
