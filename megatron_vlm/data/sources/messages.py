"""Chats as OpenAI's interface and ShareGPT's files have them: what ms-swift, LLaMA-Factory and TRL are given.

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "It?"}]},
                  {"role": "assistant", "content": "At home."}]}
    {"conversations": [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "At home."}],
     "system": "Be brief.", "images": ["a.png"]}
    {"prompt": [{"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", "content": "At home."}]}

A content is a text, or a list of typed parts, which become one text: a line break stands between two that no blank
parts, as in questions to the model (`sample.join_parts`). An image or video is named in its part, or it is the next of
the record's "images" or "videos", whose places are marked in the texts, or by parts that name none. Of a prompt with
its completion only the completion is trained.

Files with other names for these things are read with `data.source_options`: `{messages: dialog, role: speaker,
content: says, roles: {student: user, teacher: assistant}}`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.data.sample import VIDEO_TOKEN, BadSample, RecordKey, Role, Sample, Turn, join_parts
from megatron_vlm.data.sources import record_keys
from megatron_vlm.data.sources.base import SOURCES, Source
from megatron_vlm.data.sources.json_files import JsonSource, read_object
from megatron_vlm.data.sources.record_keys import check_record, check_turn, given, is_trained
from megatron_vlm.data.sources.turns import ROLES, in_order, make_sample, media_of

CHATS = ("messages", "conversations")  # one of them, or a prompt and its completion
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
IMAGE_KEYS, VIDEO_KEYS = ("images", "image"), ("videos", "video")
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url")
PART_KEYS = frozenset({"type", "text", "image", "image_url", "video", "video_url", "path", "url", "detail"})

_USED = frozenset({"id", *CHATS, "prompt", "completion", *IMAGE_KEYS, *VIDEO_KEYS, "form", *record_keys.SYSTEM_KEYS})
_OTHER_CHATS = "a chat stands in 'messages' or 'conversations', or in 'prompt' and 'completion'"
_OF_RECIPE = "the recipe's data section says it for all records"
_REFUSED = {
    **{key: why for key, why in record_keys.REFUSED.items() if key not in _USED},
    **dict.fromkeys(("query", "response", "instruction", "output", "q", "a", "conversation"), _OTHER_CHATS),
    **dict.fromkeys(("rejected_response", "rejected_messages", "rejected_images"), "of two answers none is preferred"),
    **dict.fromkeys(("objects", "channel"), "there is no place for it in what is trained"),
}
_USED_OF_TURN = frozenset({*ROLE_KEYS, *CONTENT_KEYS, *record_keys.TRAINED_KEYS})
_REFUSED_OF_TURN = {key: why for key, why in record_keys.REFUSED_OF_TURN.items() if key not in _USED_OF_TURN}


@dataclass
class _Media:
    """Images, or videos, of one record: `listed` beside the chat, and those that its parts stand for, in order."""

    key: str
    listed: tuple[str, ...]
    of_parts: list[str] = field(default_factory=list)
    num_taken: int = 0  # of `listed`, by parts that name none

    def take(self, name: str | None, origin: str) -> None:
        """A part: it names an image or video, or stands for the next one listed. Raises BadSample."""
        if name is None:
            if self.num_taken == len(self.listed):
                message = f"{origin} has a part that names no file, and only {len(self.listed)} in {self.key!r}"
                raise BadSample(f"{message}; needs one for each such part", "marker count")
            name, self.num_taken = self.listed[self.num_taken], self.num_taken + 1
        self.of_parts.append(name)

    def all(self, origin: str) -> tuple[str, ...]:
        """Those of the record. Raises BadSample: some are listed that no part stands for."""
        if not self.of_parts:
            return self.listed
        if self.num_taken < len(self.listed):
            raise BadSample(
                f"{origin} has {len(self.listed)} in {self.key!r} and {self.num_taken} parts that stand for them; "
                "equal is needed",
                "marker count",
            )
        return tuple(self.of_parts)


@SOURCES.register("messages")
class Messages(JsonSource):
    """Chats, in JSON lists or JSONL."""

    class Options(Source.Options):
        """Names that stand for the usual ones: of a record's keys, of a message's keys, and of roles."""

        messages: str | None = None
        images: str | None = None
        videos: str | None = None
        system: str | None = None
        role: str | None = None
        content: str | None = None
        roles: dict[str, Role] = {}

    def parse_texts(self, raw: bytes, key: RecordKey) -> Sample:
        """One chat. Raises BadSample: it is malformed, lacks a field or has one of the wrong kind; roles are unknown or
        out of turn; parts and media differ in number."""
        origin = self.origin(key)
        record = read_object(raw, origin)
        keys = given(self._usual(record, ("messages", "images", "videos", "system")))
        remarks = list(check_record(keys, origin, _USED, _REFUSED))
        images = _Media("images", media_of(keys, IMAGE_KEYS, origin))
        videos = _Media("videos", media_of(keys, VIDEO_KEYS, origin))
        turns = []
        for number, (entry, is_told) in enumerate(_entries(keys, record, origin)):
            turn = self._turn(entry, f"{origin} turn {number}", images, videos, remarks)
            turns.append(Turn(turn.role, turn.text, False) if is_told and turn.role == "assistant" else turn)
        turns = in_order(turns, keys, self.image_token, origin)
        name = self.number(key) if record.get("id") is None else str(record["id"])
        draft = Sample(name, tuple(turns), images.all(origin), origin, "", videos.all(origin), tuple(remarks))
        return make_sample(draft, self.image_token, str(keys.get("form", "")))

    def _usual(self, found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Keys by their usual names; what else is called so is not there."""
        assert isinstance(self.options, self.Options)
        others = {other: name for name in names if (other := getattr(self.options, name)) is not None}
        if not others:
            return found
        kept = {key: value for key, value in found.items() if key not in others and key not in others.values()}
        return {**kept, **{name: found[other] for other, name in others.items() if other in found}}

    def _turn(self, entry: Any, origin: str, images: _Media, videos: _Media, remarks: list[str]) -> Turn:
        if not isinstance(entry, dict):
            raise BadSample(f"{origin} is {type(entry).__name__}; an object with 'role' and 'content' is needed")
        entry = self._usual(entry, ("role", "content"))
        keys = given(entry)
        remarks += check_turn(keys, origin, _USED_OF_TURN, _REFUSED_OF_TURN)
        role = self._role(keys, origin)
        (name,) = [name for name in CONTENT_KEYS if name in keys][:1] or CONTENT_KEYS[:1]
        content = keys.get(name, "" if isinstance(entry.get(name), str | list) else None)
        trained = is_trained(keys, role, origin) or role != "assistant"
        if isinstance(content, str):
            return Turn(role, content, trained)
        if not isinstance(content, list):
            message = f"{origin} field {name!r} is {json.dumps(content)[:80]}; a string or a list of parts is needed"
            raise BadSample(message)
        pieces = [self._part(part, role, f"{origin} part {i}", images, videos) for i, part in enumerate(content)]
        return Turn(role, join_parts(pieces), trained)

    def _role(self, keys: dict[str, Any], origin: str) -> Role:
        assert isinstance(self.options, self.Options)
        found = next((keys[name] for name in ROLE_KEYS if name in keys), None)
        known: dict[str, Role] = {**ROLES, "developer": "system", **self.options.roles}
        if not isinstance(found, str):
            raise BadSample(f"{origin} field 'role' is {json.dumps(found)[:80]}; a string is needed")
        if found not in known:
            raise BadSample(f"{origin} is from {found[:80]!r}; known roles: {', '.join(known)}")
        return known[found]

    def _part(self, part: Any, role: Role, origin: str, images: _Media, videos: _Media) -> str:
        """A part's text, or the marker of its image or video, which is added to the record's."""
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind not in (*IMAGE_PARTS, *VIDEO_PARTS):
            known = ", ".join(map(repr, ("text", *IMAGE_PARTS, *VIDEO_PARTS)))
            raise BadSample(f"{origin} is {json.dumps(part)[:80]}; a part has a 'type' of {known}, and what it names")
        if unknown := given(part).keys() - PART_KEYS:
            message = f"{origin} has field {min(unknown)!r}, which is not read; {_OF_RECIPE}"
            raise BadSample(message, "unread field")
        if role != "user":
            raise BadSample(f"{origin} has type {kind!r} and is from the {role}; images and videos are the user's")
        media = images if kind in IMAGE_PARTS else videos
        media.take(_file_of(part, kind, origin), origin)
        return self.image_token if media is images else VIDEO_TOKEN


def _entries(keys: dict[str, Any], record: dict[str, Any], origin: str) -> Iterator[tuple[Any, bool]]:
    """Yields a record's messages, and of each whether it is told and not trained. Raises BadSample."""
    chats = [name for name in CHATS if name in keys]
    chats += ["prompt"] if {"prompt", "completion"} & keys.keys() else []
    if len(chats) != 1:
        found = ", ".join(record) or "none"
        wrong = f"has {' and '.join(map(repr, chats))}" if chats else f"has no field 'messages'; found: {found}"
        raise BadSample(f"{origin} {wrong}; {_OTHER_CHATS}")
    for name in ("prompt", "completion") if chats == ["prompt"] else chats:
        entries = keys.get(name)
        if name not in CHATS and isinstance(entries, str):  # TRL's plain texts; each is one turn
            entries = [{"role": "user" if name == "prompt" else "assistant", "content": entries}]
        if not isinstance(entries, list):
            raise BadSample(f"{origin} field {name!r} is {json.dumps(entries)[:80]}; a list of messages is needed")
        yield from ((entry, name == "prompt") for entry in entries)


def _file_of(part: dict[str, Any], kind: str, origin: str) -> str | None:
    """The file, or data URI, that a part names; None: none."""
    found = next((part[key] for key in (kind, "image_url", "path", "url") if part.get(key)), None)
    if isinstance(found, dict):
        found = found.get("url") or found.get("path")
    if found is not None and not isinstance(found, str):
        raise BadSample(f"{origin} names {json.dumps(found)[:80]}; the path of one file is needed")
    return found
