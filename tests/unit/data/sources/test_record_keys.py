"""No key of a record or of a turn is passed over in silence: it is used, known to be bookkeeping, refused, or told."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.index import building
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import BadSample, Sample, Turn, marks_image
from megatron_vlm.data.sources import record_keys
from megatron_vlm.data.sources.base import MOST_TOLD
from megatron_vlm.data.sources.llava_json import LlavaJson, parse_record
from megatron_vlm.evaluation.run import read_questions
from tests.unit.data.encoders import encoder_in

TALK = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]
TURNS = (Turn("user", "Where?"), Turn("assistant", "Here."))


def parse(*turns: dict[str, Any], **keys: Any) -> Sample:
    record = {"conversations": list(turns) or TALK, **keys}
    return parse_record(json.dumps(record).encode(), "a.json element 3", "3", "<image>")


def refused(*turns: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(BadSample, match="^a.json element 3") as caught:
        parse(*turns, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", record_keys.SYSTEM_KEYS)
def test_a_system_prompt_beside_the_conversation_is_its_system_turn(key: str) -> None:
    assert parse(**{key: "Be kind.\n"}).turns == (Turn("system", "Be kind.\n"), *TURNS)
    own = {"from": "system", "value": "Be kind."}
    assert parse(own, *TALK, **{key: "Be kind."}).turns == (Turn("system", "Be kind."), *TURNS)
    answer_to_nothing = {"from": "gpt", "value": "Hm."}
    assert parse(answer_to_nothing, *TALK, **{key: "a"}).turns == (Turn("system", "a"), *TURNS)
    assert parse(own, *TALK, **{key: ""}).turns[0].text == "Be kind."
    assert "two different system prompts, in a key and in its first turn" in refused(own, *TALK, **{key: "Be curt."})
    assert f'field {key!r} is ["Be kind."]; a string is needed' in refused(**{key: ["Be kind."]})


def test_a_system_prompt_under_both_names() -> None:
    assert parse(system="a", system_prompt="a").turns[0] == Turn("system", "a")
    message = "two different system prompts, in 'system' and 'system_prompt'; needs one"
    assert message in refused(system="a", system_prompt="b")


def test_images_are_marked_behind_the_system_prompt() -> None:
    assert parse(system="a", image="b.png").turns[1] == Turn("user", "<image>\nWhere?")


@pytest.mark.parametrize("value", ["", None, [], {}], ids=repr)
def test_what_is_empty_is_not_there(value: Any) -> None:
    keys = {*record_keys.USED - {"conversations"}, *record_keys.REFUSED, *record_keys.OTHER_NAMES, "never heard of"}
    of_turn = {*record_keys.TRAINED_KEYS, *record_keys.REFUSED_OF_TURN, "never heard of"}
    sample = parse(*({**turn, **dict.fromkeys(of_turn, value)} for turn in TALK), **dict.fromkeys(keys, value))
    assert (sample.turns, sample.images, sample.videos, sample.form, sample.remarks) == (TURNS, (), (), "", ())


@pytest.mark.parametrize("key", record_keys.REFUSED)
def test_keys_that_would_change_what_is_trained_are_refused(key: str) -> None:
    for value in (0.5, "a", [{"a": 1}]):
        assert f"has field {key!r}, which is not read; " in refused(**{key: value})
    if key in record_keys.NEUTRAL:
        assert parse(**{key: record_keys.NEUTRAL[key]}).turns == TURNS


@pytest.mark.parametrize("key", record_keys.REFUSED_OF_TURN)
def test_and_those_of_a_turn(key: str) -> None:
    message = refused(*TALK, TALK[0], {**TALK[1], key: "a"})
    assert message.startswith(f"a.json element 3 turn 3 has field {key!r}, which is not read; ")


WRITTEN_ELSEWHERE: dict[str, Any] = {  # keys as the files of other systems have them beside a conversation
    "tools": '[{"name": "look"}]', "functions": [{"name": "look"}], "documents": [{"text": "Paris is"}],
    "messages": [{"role": "user", "content": "Hi?"}], "history": [["Hi?", "Yes."]], "captions": ["A cat."],
    "chosen": TALK[1], "rejected": TALK[1], "audios": ["a.wav"],
    "frames": ["0.png", "1.png"], "video_path": "a.mp4", "image_path": "a.png", "img": "a.png", "image_url": "a.png",
    "picture": "a.png", "video_url": "a.mp4", "weight": 0, "loss": False, "train": False, "loss_mask": [0, 1],
    "sample_weight": 2.0, "chat_template": "chatml", "enable_thinking": True, "chat_template_kwargs": {"a": False},
    "loss_weight": 0.5, "mask": [0, 1], "audio": "a.wav", "video_id": "v_7", "video_start": 1.5, "video_end": 3.5,
    "incontext_images": ["a.png"], "incontext_conversations": [TALK], "image_file": "a.png", "image_files": ["a.png"],
    "image_list": ["a.png"], "image_paths": ["a.png"], "image_urls": ["a.png"], "img_path": "a.png", "imgs": ["a.png"],
    "photo": "a.png", "pictures": ["a.png"], "video_file": "a.mp4",
}  # fmt: skip
WRITTEN_IN_TURNS: dict[str, Any] = {
    "image": "a.png", "images": ["a.png"], "video": "a.mp4", "tool_calls": [{"name": "look"}], "tools": ["look"],
    "function_call": {"name": "look"}, "reasoning_content": "Hm.", "thinking": "Hm.", "role": "user", "content": "Yes.",
    "system": "Be brief.", "mask": True, "loss_mask": 0, "loss_weight": 0.5, "train_detail": [{"train": False}],
    "videos": ["a.mp4"], "audio": "a.wav", "masked": True,
}  # fmt: skip


def test_what_other_systems_write_is_used_or_refused_by_name() -> None:
    """Of names that are written here, and not taken from the tables, which may lose one."""
    for key, value in WRITTEN_ELSEWHERE.items():
        assert f"has field {key!r}, which is not read; " in refused(**{key: value})
    for key, value in WRITTEN_IN_TURNS.items():
        assert f"turn 1 has field {key!r}, which is not read; " in refused(TALK[0], {**TALK[1], key: value})
    for key in ("system", "system_prompt"):
        assert parse(**{key: "Be brief."}).turns[0] == Turn("system", "Be brief.")
    for key in ("weight", "loss", "train", "training"):
        assert not parse(*TALK, TALK[0], {**TALK[1], key: 0}).turns[3].trained
    nothing_asked = {"tools": "[]", "functions": "[]", "weight": 1, "loss": True, "train": 1.0, "loss_weight": 1}
    assert parse(**nothing_asked, sample_weight=1).turns == TURNS


@pytest.mark.parametrize("key", sorted(record_keys.OTHER_NAMES))
def test_images_under_another_name_are_refused_where_there_are_no_others(key: str) -> None:
    assert f"has field {key!r}, which is not read; images are named in 'image'" in refused(**{key: "a.png"})
    assert parse(image="a.png", **{key: "a.png"}).remarks == (f"key {key!r} is unknown and ignored",)


def test_bookkeeping_is_silent_and_what_nobody_knows_is_told() -> None:
    known = dict.fromkeys(record_keys.BOOKKEEPING, "x")
    long = "a\x1b" * 90
    sample = parse({**TALK[0], **known, "zeal": 1}, {**TALK[1], "zeal": 0}, **known, bbox=[1], **{long: False})
    assert sample.turns == TURNS
    told = [f"{key} is unknown and ignored" for key in ("key 'bbox'", f"key {long[:40]!r}", "a turn's key 'zeal'")]
    assert sample.remarks == tuple(told) and "\x1b" not in told[1]
    many = parse(**{f"key{number}": 1 for number in range(1000)})
    assert len(many.remarks) == record_keys.MOST_REMARKS


def test_no_key_is_two_things() -> None:
    tables = (record_keys.USED, record_keys.BOOKKEEPING, record_keys.REFUSED, record_keys.OTHER_NAMES)
    assert sum(map(len, tables)) == len(set().union(*tables))
    of_turn = (record_keys.USED_OF_TURN, record_keys.BOOKKEEPING, record_keys.REFUSED_OF_TURN)
    assert sum(map(len, of_turn)) == len(set().union(*of_turn))


@pytest.mark.parametrize("key", record_keys.TRAINED_KEYS)
def test_an_answer_may_be_told_and_not_trained(key: str) -> None:
    for value, trained in ((0, False), (False, False), (0.0, False), (1, True), (True, True), (1.0, True)):
        turns = parse({**TALK[0], key: 0}, {**TALK[1], key: value}, *TALK).turns
        assert [turn.trained for turn in turns] == [True, trained, True, True]
    for value in (0.5, -1, 2, "0", "false", [0], {"a": 1}, float("nan"), float("inf")):
        message = refused(*TALK, TALK[0], {**TALK[1], key: value})
        assert message.startswith(f"a.json element 3 turn 3 field {key!r} is ") and "0 or false" in message
    for value in (1, True):
        message = refused({**TALK[0], key: value}, TALK[1])
        assert f"turn 0 field {key!r} is {json.dumps(value)}, and it is from the user; 0 or false" in message


def test_two_keys_of_one_answer() -> None:
    assert not parse(*TALK, TALK[0], {**TALK[1], "weight": 0, "train": False}).turns[3].trained
    message = refused(*TALK, TALK[0], {**TALK[1], "weight": 1, "train": False})
    assert "turn 3 fields 'weight', 'train' differ; one of them is needed" in message


@pytest.mark.parametrize(
    ("question", "is_text"),
    [
        ("What is <image> in RSS?", True), ("Is it\n<image>\nor <url>?", True), ("What is an <image>", True),
        ("<image>\nWhat is this?", False), (" \n<image> What?", False), ("What is this?\n<image>\n", False),
    ],
)  # fmt: skip
def test_a_tag_without_images_is_a_text_but_where_an_image_would_stand(question: str, is_text: bool) -> None:
    answer = {"from": "gpt", "value": "<image>\nholds\n<image>"}
    asked = {"from": "human", "value": question}
    told = ("<image> in what is asked is a text, as the record has no images",)
    if is_text:
        sample = parse(asked, answer, image="")
        assert sample.turns == (Turn("user", question), Turn("assistant", answer["value"])) and sample.images == ()
        assert sample.remarks == told
    else:
        assert "has 0 image(s) and 3 <image> in its text" in refused(asked, answer)
    assert parse(TALK[0], answer).remarks == ()
    assert parse(*TALK, system="An <image> is a tag.").remarks == told
    assert "has 1 image(s) and 2 <image> in its text" in refused(TALK[0], answer, image="a.png")


@pytest.mark.parametrize(
    ("question", "is_text"),
    [
        ("What is <video> in HTML5?", True), ("Is it\n<video>\nor <audio>?", True), ("What is a <video>", True),
        ("<video>\nWhat happens?", False), (" \n<video> What?", False), ("What happens?\n<video>\n", False),
        ("<video>\n<image>\nWhat?", False), ("<image>\n<video>\nWhat?", False), ("<image><video> What?", False),
        ("What?\n<video>\n\n <image>", False), ("What?\n<image> <video>", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_images", [False, True])
def test_a_videos_marker_is_a_text_by_the_same_rule(question: str, is_text: bool, with_images: bool) -> None:
    """Of records with images, too."""
    keys = {"image": "a.png"} if with_images else {}
    asked, answer = {"from": "human", "value": question}, {"from": "gpt", "value": "<video>\nholds"}
    if is_text:
        sample = parse(asked, answer, **keys)
        text = f"<image>\n{question}" if with_images else question
        assert sample.turns == (Turn("user", text), Turn("assistant", answer["value"])) and sample.videos == ()
        assert sample.remarks == ("<video> in what is asked is a text, as the record has no videos",)
        assert with_frames(sample, (), "<image>") == sample
    else:
        assert "has 0 video(s) and 2 <video> in its text" in refused(asked, answer, **keys)
        turns = (Turn("user", question), Turn("assistant", "yes"))  # as a source of one's own may give it
        with pytest.raises(BadSample, match=r"sample '3' has 0 video\(s\) and 1 <video> in its text"):
            with_frames(Sample("3", turns, ("a.png",) * with_images, "a.json element 3"), (), "<image>")


def test_a_videos_marker_that_is_the_recipes_image_marker() -> None:
    record = {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, TALK[1]], "image": "a.png"}
    sample = parse_record(json.dumps(record).encode(), "a", "3", "<video>")
    assert sample.turns[0].text == "<video>\nWhat?" and sample.remarks == ()
    assert with_frames(sample, (), "<video>") == sample


def test_markers_without_end_take_no_time() -> None:
    begin = time.monotonic()
    for text in ("<video>\n" * 300_000 + "x", "x\n" + "\n<video>" * 300_000 + " x", "\n<image>" * 300_000 + "<video"):
        marks_image(Turn("user", f"{text}?"), "<video>", "<image>")
    assert time.monotonic() - begin < 5


def write(folder: Path, count: int = 7) -> LlavaJson:
    """Of the records all have a key that nobody knows, and every third one has another, in two turns."""
    path = folder / "data.jsonl"
    odd = [{**turn, "tone": "warm"} for turn in TALK]
    records = [{"conversations": TALK if n % 3 else odd, "bbox": [n], "source": "web"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, records)))
    return LlavaJson(path, "<image>")


def index_of(folder: Path, file: LlavaJson, rank: int = 0) -> SampleIndex:
    return open_index(file, encoder_in(folder), MediaStore(folder), folder / "spare", rank)


TOLD = "of the 7 records of {}: key 'bbox' is unknown and ignored (7); a turn's key 'tone' is unknown and "
TOLD += "ignored (3)"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_tells_of_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    """Also of one that was indexed before, and from worker processes; on rank 0 alone."""
    monkeypatch.setattr(building, "SAMPLES_PER_PROCESS", 2)
    monkeypatch.setattr(building, "SAMPLES_PER_CHUNK", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processes)))
    file = write(tmp_path)
    for _ in range(2):
        index = index_of(tmp_path, file)
        told = " ".join(capsys.readouterr().out.split())
        assert told.count(TOLD.format(file.path)) == 1 and told.count("is unknown") == 2
    assert index.remarks and index.num_records == 7
    index_of(tmp_path, file, rank=1)
    assert "is unknown" not in capsys.readouterr().out


def test_an_evaluation_tells_of_its_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert len(read_questions([file.path], None, "<image>")) == 7
    assert TOLD.format(file.path) in " ".join(capsys.readouterr().out.split())
    read_questions([file.path], None, "<image>", is_first=False)
    assert "is unknown" not in capsys.readouterr().out


def test_a_file_whose_keys_have_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "MOST_REMARKS", 30)
    path = tmp_path / "data.jsonl"
    lines = (json.dumps({"conversations": TALK, f"k{n}": 1, f"l{n}": 1, "bbox": 1}) for n in range(40))
    path.write_text("\n".join(lines))
    index = index_of(tmp_path, LlavaJson(path, "<image>"))
    assert len(index.remarks) == 30 and index.remarks["key 'bbox' is unknown and ignored"] == 40
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("is unknown") == MOST_TOLD and f"and {30 - MOST_TOLD} more" in told


def test_other_names_of_images_and_videos() -> None:
    assert parse(images=["a.png", "b.png"]) == parse(image=["a.png", "b.png"])
    assert parse(images=[{"path": "a.png"}], image="a.png") == parse(image="a.png")
    assert parse(videos="a.mp4") == parse(video="a.mp4")
    assert "has fields 'image' and 'images', which differ; one of them" in refused(image="a.png", images=["b.png"])
    assert "field 'videos' is [7]; a path or a list of paths is needed" in refused(videos=[7])


def test_a_question_beside_a_conversation_is_refused() -> None:
    assert "has field 'a' beside 'conversations'; one of the two is needed" in refused(q="Where?", a="Here.")
    for wrong, message in (
        ({"q": 7, "a": "b"}, "'q' is 7; a string"),
        ({"q": "a", "a": ["b", 7]}, "'a' is [\"b\", 7]"),
    ):
        with pytest.raises(BadSample, match="^a element 3 field") as caught:
            parse_record(json.dumps(wrong).encode(), "a element 3", "3", "<image>")
        assert message in str(caught.value)
