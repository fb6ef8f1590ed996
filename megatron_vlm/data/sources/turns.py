"""Conversations of records made samples: roles in their order, and a marker in the text for every image and video."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_vlm.data.sample import VIDEO_TOKEN, BadSample, Role, Sample, Turn, lacks_video, marks_image
from megatron_vlm.data.sources.record_keys import few, system_text

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
USUAL_MARKER = "<image>"


def paths_of(value: Any, key: str, origin: str) -> tuple[str, ...]:
    """The images or videos that a key names: a path, or a list of them, each a text or `{"path": ...}`.

    Raises:
        BadSample: it is something else.
    """
    if value is None:
        return ()
    entries = value if isinstance(value, list) else [value]
    found = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    paths = tuple(path for path in found if isinstance(path, str) and path)
    if len(paths) < len(found):
        raise BadSample(f"{origin} field {key!r} is {json.dumps(value)[:80]}; a path or a list of paths is needed")
    return paths


def media_of(keys: Mapping[str, Any], names: Sequence[str], origin: str) -> tuple[str, ...]:
    """The images or videos of a record, which one of its keys (`given`) names, or several that agree.

    Raises:
        BadSample: two differ, or one names no paths.
    """
    found = {name: paths_of(keys[name], name, origin) for name in names if name in keys}
    if len(set(found.values())) > 1:
        raise BadSample(f"{origin} has fields {' and '.join(map(repr, found))}, which differ; one of them is needed")
    return next(iter(found.values()), ())


def in_order(turns: Sequence[Turn], keys: Mapping[str, Any], image_token: str, origin: str) -> list[Turn]:
    """Turns in the one order that there is, with the system prompt that a key (`given`) names.

    Raises:
        BadSample: roles out of turn, another end than an answer, two system prompts that differ.
    """
    first = 1 if turns[0].role == "system" else 0
    beside = system_text(keys, origin)
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


def make_sample(draft: Sample, image_token: str, form: str = "") -> Sample:
    """The sample of a record whose texts may lack their markers.

    Where images are given and no text has a marker, the markers go in front of the first user turn, one line each, as
    LLaVA does. Raises BadSample naming its origin: markers and images, or videos, differ in number.
    """
    images, videos, origin, turns = draft.images, draft.videos, draft.origin, list(draft.turns)
    lacks = lacks_video(turns, image_token) or any(marks_image(turn, image_token) for turn in turns)
    if images or videos or lacks:
        turns = _mark(turns, len(images), len(videos), image_token, origin)
    remarks = list(draft.remarks)
    asked = [turn.text for turn in turns if turn.role != "assistant"]
    for marker, kind, media in ((image_token, "images", images or videos), (VIDEO_TOKEN, "videos", videos)):
        if not media and any(marker in text for text in asked) and (kind == "images" or marker != image_token):
            remarks.append(f"{marker} in what is asked is a text, as the record has no {kind}")
    return replace(draft, turns=tuple(turns), form=form, remarks=few(remarks))


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
