"""The index: right numbers, built once, anew when anything it depends on changes, never half there."""

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config.recipe_changes import UNTRAINED
from megatron_vlm.data.index import building, cache
from megatron_vlm.data.index.building import BadSamplePolicy
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.sample import IGNORE, BadSample
from megatron_vlm.data.sources import llava_json
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from tests.helpers.faults import bad_media
from tests.helpers.models.tiny import tiny_dataset, tiny_tokenizer
from tests.unit.data.encoders import SPEC, encoder_in


def open_tiny(folder: Path, rank: int = 0, **encoder: object) -> SampleIndex:
    file = LlavaJson(tiny_dataset(folder), "<image>")
    return open_index(file, encoder_in(folder, **encoder), MediaStore(folder), folder / "spare", rank)


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "train.json.index").iterdir() if path.is_dir())


@pytest.fixture
def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    build = cache.build
    monkeypatch.setattr(cache, "build", lambda *args: (calls.append(1), build(*args)))
    return calls


def test_numbers_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "SAMPLES_PER_CHUNK", 7)
    index = open_tiny(tmp_path)
    file, encoder = LlavaJson(tiny_dataset(tmp_path), "<image>"), encoder_in(tmp_path)
    assert len(index) == 24
    for number, sample in enumerate(list(file.samples())):
        assert index.tokens[number] == len(encoder.encode(sample).ids)
        assert index.images[number] == len(sample.images) and index.sample_id(number) == sample.id
        assert file.sample(index.key(number)) == sample
    copy = pickle.loads(pickle.dumps(index))
    assert copy.sample_id(3) == index.sample_id(3) and len(pickle.dumps(index)) < 500


def test_built_once_and_again_when_something_changes(tmp_path: Path, count_builds: list[int]) -> None:
    first = open_tiny(tmp_path)
    assert open_tiny(tmp_path).folder == first.folder and len(count_builds) == 1
    open_tiny(tmp_path, tokens_per_image=6)
    open_tiny(tmp_path, template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    os.utime(tmp_path / "train.json", (1, 1))
    open_tiny(tmp_path)
    assert len(count_builds) == 4 and len(published(tmp_path)) == 4


def test_unicode_ids(tmp_path: Path) -> None:
    records = [{"id": name, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
               for name in ("ü", "", "漢字", "plain")]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert [open_tiny(tmp_path).sample_id(i) for i in range(4)] == ["ü", "", "漢字", "plain"]


def test_missing_image_is_told_at_indexing(tmp_path: Path) -> None:
    tiny_dataset(tmp_path)
    (tmp_path / "images/2-1.png").unlink()
    with pytest.raises(
        DataError, match=r"train.json element 2: sample 'sample-2': image .*images/2-1.png does not exist"
    ):
        open_tiny(tmp_path)
    assert published(tmp_path) == []


def test_bad_sample_in_a_worker_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many samples are measured in processes; an error comes back as itself, and as one line."""
    monkeypatch.setattr(building, "SAMPLES_PER_PROCESS", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    records = json.loads(tiny_dataset(tmp_path).read_text())
    assert len(open_tiny(tmp_path)) == 24
    records[20]["conversations"] = records[20]["conversations"][:1]
    (tmp_path / "train.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match="train.json element 20 ends with the user") as caught:
        open_tiny(tmp_path)
    assert "\n" not in str(caught.value)


def test_nowhere_to_write_beside_the_data(tmp_path: Path) -> None:
    tiny_dataset(tmp_path)
    (tmp_path / "train.json.index").write_text("in the way")
    assert open_tiny(tmp_path).folder.is_relative_to(tmp_path / "spare")


def test_a_disk_without_room_for_it(tmp_path: Path) -> None:
    tiny_dataset(tmp_path), tiny_tokenizer(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(DataError, match="the index of .*train.json cannot be written to .*: "):
            open_tiny(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert published(tmp_path) == []
    assert len(open_tiny(tmp_path)) == 24


@pytest.mark.parametrize("name", ["samples.npy", "ids.bin", "contents.json", "dropped.jsonl"])
def test_a_damaged_index_is_told(tmp_path: Path, name: str) -> None:
    path, _, _ = bad_media.spoil(tmp_path)
    damaged = skip_bad(path, tmp_path).folder / name
    os.truncate(damaged, damaged.stat().st_size // 2)
    with pytest.raises(DataError, match=f"the index {damaged.parent} is damaged .*; remove the folder"):
        skip_bad(path, tmp_path)


def test_several_ranks_at_once(tmp_path: Path, count_builds: list[int]) -> None:
    """File locks hold between open files, so threads stand for ranks."""
    tiny_dataset(tmp_path), tiny_tokenizer(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(lambda rank: open_tiny(tmp_path, rank), [0, 0, 0, 1]))
    assert {index.folder for index in indices} == {indices[0].folder} and len(count_builds) == 1
    assert len(published(tmp_path)) == 1


def test_losing_the_race_takes_the_winners_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where file locks do nothing, two may build: the first one's folder stands, and no rubbish is left."""
    publish = building._publish

    def slow(*args: object) -> None:
        publish(*args)
        publish(*args)

    monkeypatch.setattr(building, "_publish", slow)
    assert len(open_tiny(tmp_path)) == 24
    assert len(published(tmp_path)) == 1


def test_samples_without_a_name(tmp_path: Path) -> None:
    path = tiny_dataset(tmp_path)
    path.write_text(json.dumps([{**record, "id": ""} for record in json.loads(path.read_text())]))
    assert open_tiny(tmp_path).sample_id(3) == ""


def test_a_folder_without_data_files_gets_no_index(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"data folder \S+ holds no file that ends in \.json or \.jsonl"):
        open_index(
            LlavaJson(tmp_path / "data", "<image>"), encoder_in(tmp_path), MediaStore(tmp_path), tmp_path / "spare"
        )
    assert not (tmp_path / "data.index").exists()


def skip_bad(path: Path, folder: Path, max_tokens: int = 128) -> SampleIndex:
    """The index of a data file of `folder` without its bad samples."""
    rule = BadSamplePolicy(MediaReader(SPEC, "pad"), max_tokens)
    return open_index(LlavaJson(path, "<image>"), encoder_in(folder), MediaStore(folder), folder / "spare", skip=rule)


def ids_of(index: SampleIndex) -> list[str]:
    return [index.sample_id(number) for number in range(len(index))]


def test_bad_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    path, without, blanked = bad_media.spoil(tmp_path)
    index = skip_bad(path, tmp_path)
    assert index.dropped == bad_media.DROPPED == dict(sorted(index.dropped.items()))
    clean = open_index(LlavaJson(without, "<image>"), encoder_in(tmp_path), MediaStore(tmp_path), tmp_path / "spare")
    assert clean.dropped == {} and ids_of(index) == ids_of(clean) and blanked <= set(ids_of(index))
    assert index.fingerprint_of_contents == clean.fingerprint_of_contents
    file = LlavaJson(path, "<image>")
    assert [file.sample(index.key(i)).id for i in range(len(index))] == ids_of(index)
    listed = [json.loads(line) for line in (index.folder / "dropped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in listed] == [s.id for s in list(file.samples()) if s.id not in set(ids_of(index))]
    assert all(line["place"].startswith(f"{path} element ") and line["message"] for line in listed)
    assert sum(index.dropped.values()) == len(listed)


def test_the_run_is_told_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every time, not only when the index is built."""
    path, _, _ = bad_media.spoil(tmp_path)
    for _ in range(2):
        folder = skip_bad(path, tmp_path).folder
        told = " ".join(capsys.readouterr().out.split())
        assert f"5 of 160 samples of {path} are left out (2 bomb, 2 missing, 1 not an image)" in told
        assert f"listed in {folder}/dropped.jsonl" in told


@pytest.mark.parametrize("processes", [1, 2])
def test_every_reason_to_leave_a_sample_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(building, "SAMPLES_PER_PROCESS", 4)
    monkeypatch.setattr(building, "SAMPLES_PER_CHUNK", 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processes)))
    lines = [json.dumps(record) for record in json.loads(tiny_dataset(tmp_path).read_text())]
    turns = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]
    bad = {
        2: "{not json",
        3: json.dumps({"id": "x", "conversations": turns}),
        7: json.dumps({"id": "y", "image": "gone.png", "conversations": turns}),
        11: json.dumps({"id": "z", "conversations": turns[:1]}),
        12: json.dumps({"id": "long", "conversations": [{"from": "human", "value": "how " * 200}, turns[1]]}),
    }
    for number, line in bad.items():
        lines[number] = line
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    index = skip_bad(path, tmp_path)
    assert index.dropped == {"malformed": 2, "marker count": 1, "missing": 1, "too long": 1}
    assert ids_of(index) == [f"sample-{i}" for i in range(24) if i not in bad]
    listed = [json.loads(line) for line in (index.folder / "dropped.jsonl").read_text().splitlines()]
    assert [line["place"] for line in listed] == [f"{path} line {number + 1}" for number in bad]
    assert listed[-1]["id"] == "long" and "training.sequence_length is 128" in listed[-1]["message"]
    with pytest.raises(DataError, match="line 3 is not JSON"):  # without the rule the first is an error
        open_index(LlavaJson(path, "<image>"), encoder_in(tmp_path), MediaStore(tmp_path), tmp_path / "spare")


def test_a_broken_list_stays_an_error(tmp_path: Path) -> None:
    """Where its next element begins, nobody knows."""
    path = tiny_dataset(tmp_path)
    path.write_text(path.read_text().replace('"id": "sample-3"', '"id" "sample-3"'))
    with pytest.raises(DataError, match="element 3 is not JSON"):
        skip_bad(path, tmp_path)


def test_nothing_left(tmp_path: Path) -> None:
    path = tiny_dataset(tmp_path)
    with pytest.raises(
        DataError, match=r"all of its samples are bad \(24 too long\).*; the first: .*sample-0"
    ) as caught:
        skip_bad(path, tmp_path, max_tokens=3)
    assert published(tmp_path) == [] and "\n" not in str(caught.value)


def test_a_media_root_without_its_images(tmp_path: Path) -> None:
    """Half of 18 samples with images may lack one; with one more it is the folder that is bad."""
    path = tiny_dataset(tmp_path)
    with_images = [number for number in range(24) if number % 4]
    for number in with_images[:10]:
        (tmp_path / f"images/{number}-0.png").rename(tmp_path / f"{number}")
    with pytest.raises(
        DataError, match=rf"data.media_root: found {tmp_path}, where 10 of 18 samples .* looks unmounted .*1-0.png"
    ) as caught:
        skip_bad(path, tmp_path)
    assert published(tmp_path) == [] and "\n" not in str(caught.value)
    (tmp_path / "1").rename(tmp_path / "images/1-0.png")
    assert skip_bad(path, tmp_path).dropped == {"missing": 9}


def test_images_that_are_back_are_not_left_out_silently(tmp_path: Path) -> None:
    """Until the user has the index built again; where a sample lacks another image still, nothing has changed."""
    path = tiny_dataset(tmp_path)
    for name in ("2-0", "2-2", "5-0"):
        (tmp_path / f"images/{name}.png").rename(tmp_path / name)
    first = skip_bad(path, tmp_path)
    assert first.dropped == {"missing": 2}
    (tmp_path / "2-0").rename(tmp_path / "images/2-0.png")
    assert skip_bad(path, tmp_path).folder == first.folder
    (tmp_path / "2-2").rename(tmp_path / "images/2-2.png")
    with pytest.raises(DataError, match=rf"{first.folder} lacks 1 samples .*sample 'sample-2'\); remove") as caught:
        skip_bad(path, tmp_path)
    assert "\n" not in str(caught.value)
    shutil.rmtree(first.folder)
    again = skip_bad(path, tmp_path)
    assert again.dropped == {"missing": 1} and "sample-2" in ids_of(again)


def test_indices_of_other_rules_are_other_indices(tmp_path: Path) -> None:
    path = tiny_dataset(tmp_path)
    folders = {open_tiny(tmp_path).folder, skip_bad(path, tmp_path).folder, skip_bad(path, tmp_path, 64).folder}
    assert len(folders) == 3


def edited(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """The sample with another last answer."""
    return {**record, "conversations": [*record["conversations"][:-1], {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda rs: rs, set()),
        (lambda rs: [{**rs[0], "id": "other"}, *rs[1:]], {"ids", "contents"}),
        (lambda rs: [rs[4], *rs[1:4], rs[0], *rs[5:]], {"ids", "lengths", "contents"}),
        (lambda rs: rs[:-4], {"samples", "tokens", "images", "ids", "lengths", "contents"}),
        (lambda rs: [edited(rs[0], "no no no no no no no"), *rs[1:]], {"tokens", "lengths", "contents"}),
        (lambda rs: [edited(rs[0], "yes"), *rs[1:]], {"contents"}),
        (lambda rs: [*rs[:2], {**rs[2], "image": rs[2]["image"][::-1]}, *rs[3:]], {"contents"}),
    ],
    ids=["nothing", "id", "order", "fewer", "longer answer", "answer of equal length", "images reversed"],
)
def test_fingerprint_of_contents(tmp_path: Path, change: Callable[[list[Any]], list[Any]], differing: set[str]) -> None:
    """Of what is trained on, wherever and whenever written."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tiny_dataset(tmp_path / name)
        records = json.loads(path.read_text())
        path.write_text(json.dumps([edited(records[0], "no"), *records[1:]]))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    os.utime(path, (1, 1))
    one, two = (open_tiny(tmp_path / name).fingerprint_of_contents for name in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == differing
    assert (one["samples"], len(str(one["contents"])), one.keys()) == (24, 64, two.keys())


@pytest.mark.parametrize("key", ["weight", "loss"])
def test_untrained_answers_are_part_of_the_fingerprint(tmp_path: Path, key: str) -> None:
    """Of equal bytes: a run from when the key was passed over trained the answer. Where none is, there is no number."""
    asked = {"from": "human", "value": "?"}
    turns = [asked, {"from": "gpt", "value": "a", key: 0}, asked, {"from": "gpt", "value": "b", key: 1}]
    (tmp_path / "train.json").write_text(
        json.dumps([{"conversations": turns}, {"conversations": turns[:1] + turns[3:]}])
    )
    for apart in (False, True):
        file, encoder = LlavaJson(tmp_path / "train.json", "<image>"), encoder_in(tmp_path)
        encoder.apart = apart
        found = open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare").fingerprint_of_contents
        assert found.pop(UNTRAINED) == 1 and found["samples"] == 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llava_json, "is_trained", lambda *_: True)
            os.utime(file.path, (1, 1 + apart))
            before = open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare").fingerprint_of_contents
        assert before.keys() == found.keys() and (before == found) is not apart


def test_truncated_samples_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An index of its own, with the tokens and images that are left; one without an answer is a bad sample."""
    whole, file = open_tiny(tmp_path), LlavaJson(tiny_dataset(tmp_path), "<image>")
    labels = [encoder_in(tmp_path).encode(sample).labels for sample in list(file.samples())]
    first_answers = [next(at for at, label in enumerate(row) if label != IGNORE) for row in labels]
    limit = sorted(first_answers)[12] + 1  # about half of the samples have an answer before it
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path), "<image>")
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 5, limit)
    with pytest.raises(BadSample, match=f"hold no answer .training.sequence_length {limit}"):
        open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare")
    media = MediaReader(MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), "pad")
    cut = open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare", 0, BadSamplePolicy(media, limit))
    is_long = {whole.sample_id(number) for number in range(24) if whole.tokens[number] > limit}
    assert cut.num_truncated + cut.dropped["truncated"] == len(is_long) and whole.num_truncated == 0
    assert cut.dropped["truncated"] == sum(first >= limit for first in first_answers) and cut.num_truncated > 1
    assert f"{cut.num_truncated} of {len(cut)} samples" in caplog.text and f"truncated to {limit} tokens" in caplog.text
    samples = {sample.id: sample for sample in list(file.samples())}
    for number in range(len(cut)):
        encoded = encoder.encode(samples[cut.sample_id(number)])
        assert (cut.tokens[number], cut.images[number]) == (len(encoded.ids), len(encoded.image_starts))
    assert int(cut.tokens.max()) <= limit
