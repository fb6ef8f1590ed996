"""Chats as text or parts: where their images are, whose turn it is, and what is refused, by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.sample import BadSample, Sample, Turn
from megatron_vlm.data.sources.messages import Messages
from megatron_vlm.errors import ConfigError

ASKED, ANSWERED = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}
TURNS = (Turn("user", "Where?"), Turn("assistant", "Here."))


def parse(record: Any, **options: Any) -> Sample:
    source = Messages("a.jsonl", "<image>", options)
    source._units[0] = "line"  # there is no file to look at
    return source.parse(json.dumps(record).encode(), (0, 0, 0, 3))


def parse_parts(*parts: Any, **keys: Any) -> Sample:
    return parse({"messages": [{"role": "user", "content": list(parts)}, ANSWERED], **keys})


def test_the_two_spellings_are_one() -> None:
    share = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]
    for record in (
        {"messages": [ASKED, ANSWERED]}, {"conversations": share}, {"messages": share},
        {"conversations": [ASKED, ANSWERED], "messages": []},
    ):  # fmt: skip
        assert parse(record) == Sample("3", TURNS, (), "a.jsonl line 3")


def test_parts_become_one_text() -> None:
    text = {"type": "text", "text": "Where is it?"}
    image, video = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}
    assert parse_parts(image, text).turns[0].text == "<image>\nWhere is it?"
    assert parse_parts(text, image).turns[0].text == "Where is it?\n<image>"
    assert parse_parts(image, {"type": "text", "text": "\nWhere?"}).turns[0].text == "<image>\nWhere?"
    found = parse_parts(video, image, text, image)
    assert found.turns[0].text == "<video>\n<image>\nWhere is it?\n<image>"
    assert found.images == ("a.png", "a.png") and found.videos == ("a.mp4",)
    assert parse_parts("Where?", {"type": "input_text", "text": " Now?"}).turns[0].text == "Where? Now?"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, {"type": "image", "path": "a.png"},
        {"type": "input_image", "image_url": "file://a.png"}, {"type": "image", "url": "a.png"},
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_name_an_image(part: Any) -> None:
    assert parse_parts(part).images == ("a.png",)


def test_parts_that_name_nothing_stand_for_what_is_listed() -> None:
    free, named = {"type": "image"}, {"type": "image", "image": "own.png"}
    assert parse_parts(free, named, free, images=["a.png", "b.png"]).images == ("a.png", "own.png", "b.png")
    assert parse_parts({"type": "video"}, videos=["a.mp4"]).videos == ("a.mp4",)
    for parts, keys in (((free, free), {"images": ["a.png"]}), ((free,), {}), ((named,), {"images": ["a.png"]})):
        with pytest.raises(BadSample) as caught:
            parse_parts(*parts, **keys)
        assert caught.value.reason == "marker count"


def test_what_is_listed_is_marked_in_the_texts() -> None:
    def of(content: str) -> Sample:
        return parse({"messages": [{"role": "user", "content": content}, ANSWERED], "images": ["a.png", "b.png"]})

    assert of("<image>Where<image>?").turns[0].text == "<image>Where<image>?"
    assert of("Where?").turns[0].text == "<image>\n<image>\nWhere?"
    with pytest.raises(BadSample, match="has 2 image\\(s\\) and 1 <image> in its text"):
        of("<image>Where?")


def test_a_markers_text_in_parts_is_no_image_more() -> None:
    with pytest.raises(BadSample, match="has 1 image\\(s\\) and 2 <image> in its text"):
        parse_parts({"type": "image", "image": "a.png"}, {"type": "text", "text": "What is <image>?"})


def test_options_name_what_a_file_calls_otherwise() -> None:
    record = {
        "dialog": [{"speaker": "student", "says": "Where?"}, {"speaker": "teacher", "says": "Here."}],
        "photos": ["a.png"],
        "rules": "Be kind.",
        "messages": "none of ours",
    }
    options = {
        "messages": "dialog", "images": "photos", "system": "rules", "role": "speaker", "content": "says",
        "roles": {"student": "user", "teacher": "assistant"},
    }  # fmt: skip
    found = parse(record, **options)
    assert found.turns == (Turn("system", "Be kind."), Turn("user", "<image>\nWhere?"), TURNS[1])
    assert found.images == ("a.png",) and found.remarks == ()
    with pytest.raises(ConfigError, match=r"data\.source_options: roles\.student: found 'pupil'"):
        parse(record, roles={"student": "pupil"})
    with pytest.raises(ConfigError, match=r"'column' is no option of messages \(it has: messages, images, videos,"):
        parse(record, column="dialog")


def test_turns_that_are_not_trained() -> None:
    told = {**ANSWERED, "loss": False}
    assert [turn.trained for turn in parse({"messages": [ASKED, told, ASKED, ANSWERED]}).turns] == [
        True, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "is list; an object is needed"),
        ({"id": 1}, "has no field 'messages'; found: id; a chat stands in 'messages' or 'conversations'"),
        ({"messages": []}, "has no field 'messages'; found: messages"),
        ({"messages": [ASKED], "conversations": [ASKED]}, "has 'messages' and 'conversations'; a chat stands in"),
        ({"messages": [ASKED, ANSWERED], "prompt": "a"}, "has 'messages' and 'prompt'"),
        ({"prompt": [ASKED]}, "field 'completion' is null; a list of messages is needed"),
        ({"messages": "Where?"}, "field 'messages' is \"Where\\?\"; a list of messages is needed"),
        ({"messages": [ASKED]}, "ends with the user; the last turn must be the assistant's"),
        ({"messages": [ASKED, ASKED, ANSWERED]}, "turn 1 is from the user, the assistant is needed"),
        ({"messages": ["Where?", ANSWERED]}, "turn 0 is str; an object with 'role' and 'content' is needed"),
        ({"messages": [{"content": "a"}, ANSWERED]}, "turn 0 field 'role' is null; a string is needed"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turn 0 is from 'tool'; known roles: human, user, gpt"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "turn 1 field 'content' is null; a string or a list of parts"),
        ({"messages": [{**ASKED, "content": 7}]}, "turn 0 field 'content' is 7; a string or a list of parts"),
        ({"messages": [ASKED, {**ANSWERED, "tool_calls": [1]}]}, "turn 1 has field 'tool_calls', which is not read"),
        ({"messages": [ASKED, ANSWERED], "tools": [1]}, "has field 'tools', which is not read"),
        ({"messages": [ASKED, ANSWERED], "rejected_response": "a"}, "has field 'rejected_response', which is not read"),
        ({"messages": [ASKED, ANSWERED], "audios": ["a"]}, "has field 'audios', which is not read"),
        ({"messages": [ASKED, ANSWERED], "images": [7]}, "field 'images' is \\[7\\]; a path or a list of paths"),
        ({"messages": [ASKED, ANSWERED], "images": ["a"], "image": "b"}, "fields 'images' and 'image', which differ"),
        ({"messages": [ASKED, {**ANSWERED, "content": [{"type": "image"}]}]}, "'image' and is from the assistant"),
        ({"messages": [{**ASKED, "content": [{"type": "audio"}]}]}, "part 0 is .*; a part has a 'type' of 'text'"),
        ({"messages": [{**ASKED, "content": [7]}]}, "turn 0 part 0 is 7; a part has a 'type' of"),
        ({"messages": [{**ASKED, "content": [{"type": "text"}]}]}, "a part has a 'type' of 'text', .*, and what"),
        (
            {"messages": [{**ASKED, "content": [{"type": "video", "video": "a", "fps": 2}]}]},
            "part 0 has field 'fps', which is not read; the recipe's data section says it for all records",
        ),
        (
            {"messages": [{**ASKED, "content": [{"type": "video", "video": ["0.png", "1.png"]}]}]},
            'names \\["0.png", "1.png"\\]; the path of one file is needed',
        ),
        (
            {"messages": [{**ASKED, "content": [{"type": "image", "image": "https://a.b/c.png"}]}, ANSWERED]},
            "names https://a.b/c.png, an address in the network; the path of a file is needed",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_used_is_named(record: Any, message: str) -> None:
    with pytest.raises(BadSample, match=f"^a.jsonl line 3 (.* )?{message}") as caught:
        parse(record)
    assert "\n" not in str(caught.value)


def test_what_nobody_knows_is_told(tmp_path: Path) -> None:
    record = {"messages": [{**ASKED, "mood": "gay"}, ANSWERED], "bbox": [1], "source": "web"}
    assert parse(record).remarks == (
        "key 'bbox' is unknown and ignored",
        "a turn's key 'mood' is unknown and ignored",
    )
