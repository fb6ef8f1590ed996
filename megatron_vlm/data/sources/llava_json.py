"""LLaVA's conversation files: a JSON list of objects, or one object per line (JSONL).

    {"id": "7", "image": "a.png" | ["a.png", "b.png"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

    {"id": "8", "video": "a.mp4", "q": "What is this?", "a": "A cat." | ["A cat.", "A kitten."]}

"images" and "videos" are other names of "image" and "video". Of several answers to one question one is trained, which
the record's bytes choose, so it is the same in every run. A video is a file, or a folder with an image file per frame,
and stands where its <video> stands. In a record without either, the image marker is a text as any other, but where an
image would stand (`sample.marks_image`); so is <video> in one without videos. What other keys do, `record_keys.py`
says.
"""

import hashlib
import json
from typing import Any

from megatron_vlm.data.sample import BadSample, RecordKey, Sample, Turn
from megatron_vlm.data.sources.base import SOURCES
from megatron_vlm.data.sources.json_files import JsonSource, read_object
from megatron_vlm.data.sources.record_keys import check_record, check_turn, given, is_trained
from megatron_vlm.data.sources.turns import ROLES, in_order, make_sample, media_of


@SOURCES.register("llava_json")
class LlavaJson(JsonSource):
    """Conversations as LLaVA writes them."""

    def parse_texts(self, raw: bytes, key: RecordKey) -> Sample:
        """One object. Raises BadSample: it is malformed, lacks a field or has one of the wrong kind; roles are unknown
        or out of turn."""
        return parse_record(raw, self.origin(key), self.number(key), self.image_token)


def parse_record(raw: bytes, origin: str, default_id: str, image_token: str) -> Sample:
    """One object's bytes -> a sample whose markers and images agree in number, where it has images (`make_sample`).
    Raises BadSample naming `origin` and what is wrong."""
    record = read_object(raw, origin)
    keys = given(record)
    remarks = list(check_record(keys, origin))
    images, videos = (media_of(keys, names, origin) for names in (("image", "images"), ("video", "videos")))
    if "conversations" in record:
        turns = _turns(record["conversations"], origin, remarks)
    elif "q" in keys and "a" in keys:
        turns = _question(keys, raw, origin)
    else:
        raise BadSample(f"{origin} has no field 'conversations'; found: {', '.join(record) or 'none'}")
    turns = in_order(turns, keys, image_token, origin)
    name = default_id if record.get("id") is None else str(record["id"])
    draft = Sample(name, tuple(turns), images, origin, "", videos, tuple(remarks))
    return make_sample(draft, image_token, str(keys.get("form", "")))


def _question(keys: dict[str, Any], raw: bytes, origin: str) -> list[Turn]:
    """A question and one of its answers."""
    question, found = keys["q"], keys["a"]
    answers = found if isinstance(found, list) else [found]
    for key, texts in (("q", [question]), ("a", answers)):
        if not all(isinstance(text, str) for text in texts):
            wanted = "a string is needed" if key == "q" else "a string or a list of strings is needed"
            raise BadSample(f"{origin} field {key!r} is {json.dumps(keys[key])[:80]}; {wanted}")
    drawn = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    return [Turn("user", question), Turn("assistant", answers[drawn % len(answers)])]


def _turns(entries: Any, origin: str, remarks: list[str]) -> list[Turn]:
    """Its turns; what is to be told of their keys is added to `remarks`."""
    if not isinstance(entries, list) or not entries:
        raise BadSample(f"{origin} field 'conversations' must be a list with at least one question and answer")
    return [_turn(entry, f"{origin} turn {number}", remarks) for number, entry in enumerate(entries)]


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
