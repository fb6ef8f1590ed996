"""LLaVA's conversation files: a JSON list of objects, or one object per line (JSONL).

    {"id": "7", "image": "a.png" | ["a.png", "b.png"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A video is named in "video" (a file, or a folder with an image file per frame) and stands where its <video> stands.
In a record without either, the image marker is a text as any other, but where an image would stand
(`sample.marks_image`); so is <video> in one without videos. What other keys do, `record_keys.py` says.

A file is scanned once for the place of every object; after that one object's bytes are read and parsed at a time, so a
list of gigabytes costs its memory once, at indexing, and never in a worker. The scan decodes as Latin-1, in which a
character is a byte and JSON's own signs are what they are in UTF-8: positions in the text are offsets in the file.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vlm.data.sample import VIDEO_TOKEN, BadSample, Role, Sample, Turn, lacks_video, marks_image
from megatron_vlm.data.sources.base import SOURCES, Extent, RecordFile
from megatron_vlm.data.sources.record_keys import check_record, check_turn, few, given, is_trained, system_text
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.runtime.files import open_regular, parse_json

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
USUAL_MARKER = "<image>"
HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
BLANK = re.compile(r"[ \t\r\n]*")
BYTE_ORDER_MARK = "\xef\xbb\xbf"  # UTF-8's, as Latin-1
FIRST_BYTES = 2**22  # of a file, which hold its first records
UTF_16_MARKS = ("\xff\xfe", "\xfe\xff")


@SOURCES.register("llava_json")
class LlavaFile(RecordFile):
    """A JSON list or JSONL; which of them is told from its first character."""

    def __init__(self, path: str | Path, image_token: str) -> None:
        super().__init__(path, image_token)
        self._is_list: bool | None = None

    def scan(self) -> list[Extent]:
        """The place of every object, in file order.

        Raises:
            DataError: the file cannot be read, is empty, or is not JSON.
        """
        extents = list(self._places(self._read()))
        if not extents:
            raise DataError(f"{self.path} holds no conversation")
        return extents

    def first(self, count: int) -> list[Extent]:
        """The first records, as of all sources; of a large file only the beginning is read: `scan` tells its faults."""
        text = self._read(FIRST_BYTES)
        if len(text) < FIRST_BYTES:
            return self.scan()[:count]
        found: list[Extent] = []
        with contextlib.suppress(DataError):  # most likely where the text is cut
            for extent in islice(self._places(text), count):
                if extent.offset + extent.size < len(text):
                    found.append(extent)
        return found

    def _read(self, num_bytes: int = -1) -> str:
        """The file's beginning, by default all of it, as Latin-1. Raises DataError."""
        try:
            with open_regular(self.path) as file:
                return file.read(num_bytes).decode("latin-1")
        except OSError as error:
            raise DataError(f"data file {self.path} cannot be read: {error.strerror}") from error
        except MemoryError as error:
            size = self.path.stat().st_size
            raise DataError(f"data file {self.path} has {size:,} bytes; to index it takes twice the memory") from error

    def _places(self, text: str) -> Iterator[Extent]:
        """Raises DataError where it is not JSON."""
        if text.startswith(UTF_16_MARKS):
            raise DataError(f"{self.path} is UTF-16; UTF-8 is needed")
        start = _skip_blank(text, len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK) else 0)
        yield from self._scan_list(text, start + 1) if text[start : start + 1] == "[" else _scan_lines(text, start)

    def parse(self, raw: bytes, origin: str, default_id: str) -> Sample:
        """One object. Raises BadSample: it is malformed, lacks a field or has one of the wrong kind; roles are unknown
        or out of turn."""
        return parse_record(raw, origin, default_id, self.image_token)

    def origin(self, extent: Extent) -> str:
        """Name of the object in error messages."""
        if self._is_list is None:
            with open_regular(self.path) as file:
                self._is_list = file.read(64).decode("latin-1").removeprefix(BYTE_ORDER_MARK).lstrip().startswith("[")
        return f"{self.path} {'element' if self._is_list else 'line'} {extent.number}"

    def _scan_list(self, text: str, position: int) -> Iterator[Extent]:
        """`position` is just inside the list's opening bracket."""
        decode = json.JSONDecoder().raw_decode
        position = _skip_blank(text, position)
        separator, number = ",", 0
        if text[position : position + 1] == "]":
            separator, position = "]", _skip_blank(text, position + 1)
        while separator == ",":
            try:
                _, end = decode(text, position)
            except (ValueError, RecursionError) as error:
                place, reason = (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (position, error)
                where = f"line {text.count(chr(10), 0, place) + 1}, byte {place}"
                raise DataError(f"{self.path} element {number} is not JSON: {reason} ({where})") from error
            yield Extent(position, end - position, number)
            end = _skip_blank(text, end)
            separator = text[end : end + 1]
            if separator not in (",", "]"):
                line = text.count("\n", 0, end) + 1
                raise DataError(f"{self.path} line {line}: ',' or ']' is needed after element {number}")
            position = _skip_blank(text, end + 1)
            number += 1
        if position < len(text):
            line = text.count("\n", 0, position) + 1
            raise DataError(f"{self.path} line {line}: nothing may follow the list's ']'")


def _skip_blank(text: str, position: int) -> int:
    found = BLANK.match(text, position)
    assert found is not None, "it matches the empty text too"
    return found.end()


def _scan_lines(text: str, position: int) -> Iterator[Extent]:
    number = text.count("\n", 0, position) + 1
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        if not BLANK.fullmatch(text, position, end):
            yield Extent(position, end - position, number)
        position, number = end + 1, number + 1


def parse_record(raw: bytes, origin: str, default_id: str, image_token: str) -> Sample:
    """One object's bytes -> a sample whose markers and images agree in number, where it has images.

    Where images are given and no text has a marker, the markers go in front of the first user turn, one line each, as
    LLaVA does. Raises BadSample naming `origin` and what is wrong.
    """
    record = _read_object(raw, origin)
    keys = given(record)
    remarks = list(check_record(keys, origin))
    images, videos = _paths(keys.get("image"), "image", origin), _paths(keys.get("video"), "video", origin)
    turns = _turns(record, origin, image_token, remarks)
    lacks = lacks_video(turns, image_token) or any(marks_image(turn, image_token) for turn in turns)
    if images or videos or lacks:
        turns = _mark(turns, len(images), len(videos), image_token, origin)
    asked = [turn.text for turn in turns if turn.role != "assistant"]
    for marker, kind, media in ((image_token, "images", images or videos), (VIDEO_TOKEN, "videos", videos)):
        if not media and any(marker in text for text in asked) and (kind == "images" or marker != image_token):
            remarks.append(f"{marker} in what is asked is a text, as the record has no {kind}")
    id_ = record.get("id")
    name = default_id if id_ is None else str(id_)
    return Sample(name, tuple(turns), images, origin, str(keys.get("form", "")), videos, few(remarks))


def _read_object(raw: bytes, origin: str) -> dict[str, Any]:
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


def _paths(value: Any, key: str, origin: str) -> tuple[str, ...]:
    if value is None:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise BadSample(f"{origin} field {key!r} is {json.dumps(value)[:80]}; a path or a list of paths is needed")
    return tuple(paths)


def _turns(record: dict[str, Any], origin: str, image_token: str, remarks: list[str]) -> list[Turn]:
    """Its turns, with the system prompt that a key names; what is to be told of their keys is added to `remarks`."""
    if "conversations" not in record:
        raise BadSample(f"{origin} has no field 'conversations'; found: {', '.join(record) or 'none'}")
    entries = record["conversations"]
    if not isinstance(entries, list) or not entries:
        raise BadSample(f"{origin} field 'conversations' must be a list with at least one question and answer")
    turns = [_turn(entry, f"{origin} turn {number}", remarks) for number, entry in enumerate(entries)]
    first = 1 if turns[0].role == "system" else 0
    beside = system_text(given(record), origin)
    if first and beside not in (None, turns[0].text):
        raise BadSample(f"{origin} has two different system prompts, in a key and in its first turn; needs one")
    system = [Turn("system", beside)] if beside is not None else turns[:first]
    begin = first
    if len(turns) > first + 1 and turns[first].role == "assistant" and image_token not in turns[first].text:
        begin += 1  # an answer to nothing: LLaVA's own loader leaves it out too, and its 665k mix has some
    for number, turn in enumerate(turns[begin:], start=begin):
        wanted = ("user", "assistant")[(number - begin) % 2]
        if turn.role != wanted:
            raise BadSample(
                f"{origin} turn {number} is from the {turn.role}, the {wanted} is needed: an optional system turn, "
                "then user and assistant in alternation"
            )
    if turns[-1].role != "assistant":
        raise BadSample(f"{origin} ends with the {turns[-1].role}; the last turn must be the assistant's")
    return [*system, *turns[begin:]]


def _turn(entry: Any, origin: str, remarks: list[str]) -> Turn:
    if not isinstance(entry, dict):
        raise BadSample(f"{origin} is {type(entry).__name__}; an object with 'from' and 'value' is needed")
    remarks += check_turn(given(entry), origin)
    for key in ("from", "value"):
        if not isinstance(entry.get(key), str):
            raise BadSample(f"{origin} field {key!r} is {json.dumps(entry.get(key))[:80]}; a string is needed")
    if entry["from"] not in ROLES:
        raise BadSample(f"{origin} is from {entry['from']!r}; known roles: {', '.join(ROLES)}")
    role = ROLES[entry["from"]]
    return Turn(role, entry["value"], is_trained(given(entry), role, origin) or role != "assistant")


def _mark(turns: list[Turn], num_images: int, num_videos: int, image_token: str, origin: str) -> list[Turn]:
    """Each image and video marked in the texts. Raises BadSample where more or fewer are marked than there are."""
    if num_videos or lacks_video(turns, image_token):
        turns = _mark_videos(turns, num_videos, num_images, image_token, origin)
    found = sum(turn.text.count(image_token) for turn in turns)
    if num_images and not found:
        if any(USUAL_MARKER in turn.text for turn in turns):
            message = f"{origin} marks its image(s) by {USUAL_MARKER}; data.image_token is {image_token!r}"
            raise BadSample(message, "marker count")
        turns = _prepend_markers(turns, num_images, image_token)
    elif found != num_images:
        message = f"{origin} has {num_images} image(s) and {found} {image_token} in its text; equal is needed"
        raise BadSample(message, "marker count")
    return turns


def _prepend_markers(turns: list[Turn], count: int, image_token: str) -> list[Turn]:
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    text = f"{image_token}\n" * count + turns[first].text
    return [*turns[:first], replace(turns[first], text=text), *turns[first + 1 :]]


def _mark_videos(turns: list[Turn], num_videos: int, num_images: int, image_token: str, origin: str) -> list[Turn]:
    """Each video marked by VIDEO_TOKEN: as the text has it; or where it has image markers for videos alone, as
    LLaVA-Video's; or, where it has none, in front of the first user turn."""
    found, found_images = (sum(turn.text.count(token) for turn in turns) for token in (VIDEO_TOKEN, image_token))
    if found == num_videos:
        return turns
    if not found and not num_images and found_images == num_videos:
        return [replace(turn, text=turn.text.replace(image_token, VIDEO_TOKEN)) for turn in turns]
    if found or found_images not in (0, num_images):
        message = f"{origin} has {num_videos} video(s) and {found} {VIDEO_TOKEN} in its text; equal is needed, or none"
        raise BadSample(message, "marker count")
    return _prepend_markers(turns, num_videos, VIDEO_TOKEN)
