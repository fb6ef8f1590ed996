"""LLaVA's conversation files: a JSON list of objects, or one object per line (JSONL).

    {"id": "7", "image": "a.png" | ["a.png", "b.png"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A video is named in "video" (a file, or a folder with an image file per frame) and stands where its <video> stands.
In a record without either, the image marker is a text as any other, but where an image would stand
(`sample.marks_image`); so is <video> in one without videos. What other keys do, `record_keys.py` says.
"""

import json
from dataclasses import replace
from typing import Any

from megatron_vlm.data.sample import VIDEO_TOKEN, BadSample, RecordKey, Role, Sample, Turn, lacks_video, marks_image
from megatron_vlm.data.sources.base import SOURCES
from megatron_vlm.data.sources.json_files import JsonSource, read_object
from megatron_vlm.data.sources.record_keys import check_record, check_turn, few, given, is_trained, system_text

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
USUAL_MARKER = "<image>"


@SOURCES.register("llava_json")
class LlavaJson(JsonSource):
    """Conversations as LLaVA writes them."""

    def parse_texts(self, raw: bytes, key: RecordKey) -> Sample:
        """One object. Raises BadSample: it is malformed, lacks a field or has one of the wrong kind; roles are unknown
        or out of turn."""
        return parse_record(raw, self.origin(key), self.number(key), self.image_token)


def parse_record(raw: bytes, origin: str, default_id: str, image_token: str) -> Sample:
    """One object's bytes -> a sample whose markers and images agree in number, where it has images.

    Where images are given and no text has a marker, the markers go in front of the first user turn, one line each, as
    LLaVA does. Raises BadSample naming `origin` and what is wrong.
    """
    record = read_object(raw, origin)
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
