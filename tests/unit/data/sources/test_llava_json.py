"""Conversation files: places of objects, LLaVA's forms, and one clear error for each thing that can be wrong."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.sample import Turn
from megatron_vlm.data.sources import Extent, json_files, keys_of
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.errors import DataError

QA = [{"from": "human", "value": "Was ist dás? ☃"}, {"from": "gpt", "value": 'Ein "[{Tier}]",\n漢字'}]


def write(path: Path, text: str) -> LlavaJson:
    path.write_bytes(text.encode())
    return LlavaJson(path, "<image>")


RECORDS = [
    {"id": 7, "conversations": QA},
    {"id": "ü", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, QA[1]]},
    {"image": ["a.png", "b/c.png"], "conversations": [{"from": "system", "value": "Be brief."}, *QA], "form": "pair"},
    {"id": "x", "image": None, "conversations": [*QA, *QA]},
]


@pytest.mark.parametrize("layout", ["list", "indented", "lines", "lines with gaps", "byte order mark", "windows"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_both_forms_give_the_same_samples(tmp_path: Path, layout: str, ascii_only: bool) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in RECORDS]
    text = {
        "list": "[" + ", ".join(lines) + "]",
        "indented": "\n " + json.dumps(RECORDS, indent=2, ensure_ascii=ascii_only) + "\n\n",
        "lines": "\n".join(lines),
        "lines with gaps": "\n\n".join(lines) + "\n  \n",
        "byte order mark": "\ufeff[" + ",\n".join(lines) + "]",
        "windows": "\r\n".join(lines) + "\r\n",
    }[layout]
    file = write(tmp_path / "data.json", text)
    samples = list(file.samples())
    assert [sample.id for sample in samples[:2]] == ["7", "ü"]
    assert samples[0].turns == (Turn("user", QA[0]["value"]), Turn("assistant", QA[1]["value"]))
    assert samples[1].images == ("a.png",)
    assert samples[2].images == ("a.png", "b/c.png") and samples[2].form == "pair"
    assert samples[2].turns[1].text == "<image>\n<image>\n" + QA[0]["value"]
    assert samples[3].images == () and len(samples[3].turns) == 4
    numbers = [0, 1, 2, 3] if "[" in text[:3] else [1, 3, 5, 7] if layout == "lines with gaps" else [1, 2, 3, 4]
    assert file.scan()[:, 3].tolist() == numbers
    raw = (tmp_path / "data.json").read_bytes()
    for extent, record in zip(map(Extent._make, keys_of(file.scan())), RECORDS, strict=True):
        assert json.loads(raw[extent.offset : extent.offset + extent.size]) == record


def test_a_fetch_reads_only_its_own_bytes(tmp_path: Path) -> None:
    file = write(
        tmp_path / "data.json", json.dumps([{"id": i, "conversations": QA, "pad": "x" * 10_000} for i in range(500)])
    )
    key = tuple(file.scan()[250])
    tracemalloc.start()
    assert LlavaJson(file.path, "<image>").sample(key).id == "250"
    assert tracemalloc.get_traced_memory()[1] < 300_000  # the file has 5 MB
    tracemalloc.stop()


def one(**changes: Any) -> str:
    """A good record and then one that is changed."""
    return json.dumps([RECORDS[0], {"id": "bad", "conversations": QA, **changes}])


def talk(*roles: str) -> str:
    return one(conversations=[{"from": role, "value": "text"} for role in roles])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no conversation"),
        ("[ ]", "holds no conversation"),
        ("  \n ", "holds no conversation"),
        ("[{},\n{]", r"element 1 is not JSON: .*line 2, byte"),
        ("[{},\n", r"element 1 is not JSON: .*line 2, byte"),
        ("[{},]", r"element 1 is not JSON: .*line 1, byte 4"),
        ("[{}\n{}]", "line 2: ',' or ']' is needed after element 0"),
        ("[{}\n", "line 2: ',' or ']' is needed after element 0"),
        ("[{}]\n{}", r"line 2: nothing may follow the list's '\]'"),
        ('{"id": 1', "line 1 is not JSON"),
        (json.dumps(RECORDS[0]) + "\n\n{oops}\n", "line 3 is not JSON"),
        ("[[1]]", "element 0 is list; an object is needed"),
        ("[{}]", "element 0 has no field 'conversations'; found: none"),
        (one(conversations=[]), "element 1 field 'conversations' must be a list with at least one"),
        (one(conversations="hi"), "element 1 field 'conversations' must be a list"),
        (one(conversations=["hi"]), "element 1 turn 0 is str; an object with 'from' and 'value'"),
        (one(conversations=[{"from": "human"}]), "element 1 turn 0 field 'value' is null; a string is needed"),
        (one(conversations=[{"from": 3, "value": ""}]), "element 1 turn 0 field 'from' is 3; a string is needed"),
        (talk("human", "bot"), "element 1 turn 1 is from 'bot'; known roles: human, user, gpt"),
        (talk("gpt", "gpt"), "element 1 turn 1 is from the assistant, the user is needed"),
        (talk("gpt"), "element 1 turn 0 is from the assistant, the user is needed"),
        (talk("human", "human"), "element 1 turn 1 is from the user, the assistant is needed"),
        (talk("human", "gpt", "gpt"), "element 1 turn 2 is from the assistant, the user is needed"),
        (talk("human", "system", "gpt"), "element 1 turn 1 is from the system, the assistant is needed"),
        (talk("human"), "element 1 ends with the user; the last turn must be the assistant's"),
        (talk("system"), "element 1 ends with the system; the last turn must be the assistant's"),
        (one(image=3), "element 1 field 'image' is 3; a path or a list of paths is needed"),
        (one(image=["a", ""]), "element 1 field 'image' is .*; a path or a list of paths is needed"),
        (one(video_id="a"), "element 1 has field 'video_id', which is not read"),
        (one(video=3), "element 1 field 'video' is 3; a path or a list of paths is needed"),
        (one(conversations=RECORDS[1]["conversations"]), r"element 1 has 0 image\(s\) and 1 <image> in its text"),
        (one(conversations=RECORDS[1]["conversations"], image=["a", "b"]), r"element 1 has 2 image\(s\) and 1 <image>"),
    ],
)  # fmt: skip
def test_errors_name_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "some.json", text)
    with pytest.raises(DataError, match=message) as caught:
        list(file.samples())
    assert "some.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_answer_before_any_question_is_left_out(tmp_path: Path) -> None:
    turns = [{"from": role, "value": role} for role in ("system", "gpt", "human", "gpt")]
    (_, sample) = write(tmp_path / "some.json", one(conversations=turns)).samples()
    assert [turn.text for turn in sample.turns] == ["system", "human", "gpt"]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="some.jsonl line 1 is not JSON"):
        list(LlavaJson(tmp_path / "some.jsonl", "<image>").samples())


def test_another_marker_than_the_files_is_not_put_beside_it(tmp_path: Path) -> None:
    """The file's own would be trained on as a text."""
    write(tmp_path / "some.json", one(conversations=RECORDS[1]["conversations"], image="a"))
    with pytest.raises(DataError, match="element 1 marks its image.s. by <image>; data.image_token is '<img>'"):
        list(LlavaJson(tmp_path / "some.json", "<img>").samples())


def test_lines_of_one_object_are_told_apart_from_a_list(tmp_path: Path) -> None:
    file = write(tmp_path / "some.json", json.dumps(RECORDS[0], indent=1))
    with pytest.raises(DataError, match="line 1 is not JSON: .*, column 2; a file holds one list of objects, or one"):
        list(file.samples())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.json cannot be read: No such file"):
        LlavaJson(tmp_path / "none.json", "<image>").scan()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'[{"id": "a", "conversations": [{"from": "human", "value": "\\ud83d"}]}]',
            "element 0 is not JSON: .*surrogates",
        ),
        (b'{"id": "\\uDE00", "conversations": []}', "line 1 is not JSON: .*surrogates"),
        (b"[" * 100_000, "element 0 is not JSON: .*recursion"),
        (b'{"a": ' + b"[" * 100_000, "line 1 is not JSON: .*nests too deep"),
        (b'[{"id": ' + b"9" * 5000 + b"}]", "element 0 is not JSON: .*5000 digits"),
        (json.dumps([{"conversations": QA}]).encode("utf-16"), "is UTF-16; UTF-8 is needed"),
    ],
    ids=["half of a character", "half in a line", "deep list", "deep line", "huge number", "utf-16"],
)
def test_what_json_allows_and_nobody_can_use_is_a_data_error(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(LlavaJson(tmp_path / "data.json", "<image>").samples())


def test_whole_escaped_characters_and_missing_ids(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "\U0001f600"}, QA[1]]
    file = write(tmp_path / "data.json", json.dumps([{"id": None, "conversations": turns}, {"conversations": turns}]))
    samples = list(file.samples())
    assert samples[0].turns[0].text == "\U0001f600" and [sample.id for sample in samples] == ["0", "1"]


@pytest.mark.parametrize(
    ("question", "media", "marked"),
    [
        ("<video>\nWhat?", {"video": "a.mp4"}, "<video>\nWhat?"),
        ("<image>\nWhat?", {"video": "a.mp4"}, "<video>\nWhat?"),
        ("What?", {"video": ["a.mp4", "b"]}, "<video>\n<video>\nWhat?"),
        ("<image> What?", {"video": "a.mp4", "image": "a.png"}, "<video>\n<image> What?"),
        ("<video> and <image>", {"video": "a.mp4", "image": "a.png"}, "<video> and <image>"),
        ("What is <video>?", {"video": ""}, "What is <video>?"),
    ],
)
def test_videos_stand_where_they_are_marked(tmp_path: Path, question: str, media: Any, marked: str) -> None:
    turns = [{"from": "human", "value": question}, QA[1]]
    (_, sample) = write(tmp_path / "some.json", one(conversations=turns, **media)).samples()
    wanted = media["video"] or []
    assert sample.turns[0].text == marked
    assert sample.videos == (tuple(wanted) if isinstance(wanted, list) else (wanted,))


@pytest.mark.parametrize("question", ["<video> and <video>", "<image> and <image>"])
def test_another_number_of_markers_than_of_videos(tmp_path: Path, question: str) -> None:
    turns = [{"from": "human", "value": question}, QA[1]]
    with pytest.raises(DataError, match=r"element 1 has 1 video\(s\) and \d <video> in its text"):
        list(write(tmp_path / "some.json", one(conversations=turns, video="a.mp4")).samples())


@pytest.mark.parametrize("window", [1, 7, 64, 300])
def test_a_list_is_read_in_windows(tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records over their borders, numbers and blanks cut by them, and faults, are found where they are."""
    lists = [
        json.dumps(RECORDS, indent=3), "\ufeff " + json.dumps(RECORDS) + "  \n ", "[1234567,\n\n   12345 , {}]",
        "[ ]  ", json.dumps(RECORDS)[:-3], "[1,2 3]", "[{},\n\n {'a': 1}]", "[[1], [2]] 3", '["unfinished', "[12345",
    ]  # fmt: skip
    found: dict[int, list[object]] = {}
    for size in (2**24, window):
        monkeypatch.setattr(json_files, "WINDOW_BYTES", size)
        found[size] = []
        for number, text in enumerate(lists):
            file = write(tmp_path / f"{number}.json", text)
            try:
                found[size].append(file.scan().tolist())
            except DataError as error:
                found[size].append(str(error))
    assert found[window] == found[2**24] and sum(isinstance(one, str) for one in found[window]) == 7
    assert [place[3] for place in found[window][2]] == [0, 1, 2]  # type: ignore[index]


def test_a_large_list_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "WINDOW_BYTES", 2**16)
    file = write(tmp_path / "a.json", json.dumps([{"conversations": QA, "pad": "x" * 1000}] * 3000))
    tracemalloc.start()
    assert len(file.scan()) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the file has 3 MB
