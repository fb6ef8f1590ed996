"""The index: right numbers, built once, anew when anything it depends on changes, never half there."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_vlm.data import index as index_module
from megatron_vlm.data.conversation import ConversationEncoder
from megatron_vlm.data.index import SampleIndex, open_index
from megatron_vlm.data.sources.llava_json import LlavaFile
from megatron_vlm.data.tokenizer import load_tokenizer
from megatron_vlm.errors import DataError
from tests.helpers.tiny import tiny_dataset, tiny_tokenizer


def encoder_in(folder: Path, tokens_per_image: int = 5, template: str | None = None) -> ConversationEncoder:
    tokenizer = load_tokenizer(tiny_tokenizer(folder), "<image>")
    if template is not None:
        tokenizer.chat_template = template
    return ConversationEncoder(tokenizer, "auto", "<image>", tokens_per_image)


def open_tiny(folder: Path, rank: int = 0, **encoder: object) -> SampleIndex:
    file = LlavaFile(tiny_dataset(folder), "<image>")
    return open_index(file, encoder_in(folder, **encoder), folder, folder / "spare", rank)


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "train.json.index").iterdir() if path.is_dir())


@pytest.fixture
def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda *args: (calls.append(1), build(*args)))
    return calls


def test_numbers_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SAMPLES_PER_CHUNK", 7)
    index = open_tiny(tmp_path)
    file, encoder = LlavaFile(tiny_dataset(tmp_path), "<image>"), encoder_in(tmp_path)
    assert len(index) == 24
    for number, sample in enumerate(file.read_all()):
        assert index.tokens[number] == len(encoder.encode(sample).ids)
        assert index.images[number] == len(sample.images) and index.sample_id(number) == sample.id
        assert file.read(index.extent(number)) == sample
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


def test_missing_picture_is_told_at_indexing(tmp_path: Path) -> None:
    tiny_dataset(tmp_path)
    (tmp_path / "images/2-1.png").unlink()
    with pytest.raises(
        DataError, match=r"train.json element 2: sample 'sample-2': image .*images/2-1.png does not exist"
    ):
        open_tiny(tmp_path)
    assert published(tmp_path) == []


def test_bad_sample_in_a_worker_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many samples are measured in processes; an error comes back as itself, and as one line."""
    monkeypatch.setattr(index_module, "SAMPLES_PER_PROCESS", 4)
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


def test_several_ranks_at_once(tmp_path: Path, count_builds: list[int]) -> None:
    """File locks hold between open files, so threads stand for ranks."""
    tiny_dataset(tmp_path), tiny_tokenizer(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(lambda rank: open_tiny(tmp_path, rank), [0, 0, 0, 1]))
    assert {index.folder for index in indices} == {indices[0].folder} and len(count_builds) == 1
    assert len(published(tmp_path)) == 1


def test_losing_the_race_takes_the_winners_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where file locks do nothing, two may build: the first one's folder stands, and no rubbish is left."""
    publish = index_module._publish

    def slow(records: object, ids: bytes, folder: Path) -> None:
        publish(records, ids, folder)
        publish(records, ids, folder)

    monkeypatch.setattr(index_module, "_publish", slow)
    assert len(open_tiny(tmp_path)) == 24
    assert len(published(tmp_path)) == 1


def test_samples_without_a_name(tmp_path: Path) -> None:
    path = tiny_dataset(tmp_path)
    path.write_text(json.dumps([{**record, "id": ""} for record in json.loads(path.read_text())]))
    assert open_tiny(tmp_path).sample_id(3) == ""


def test_a_folder_is_no_data_file_and_gets_no_index(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data cannot be read: it is not a file"):
        open_index(LlavaFile(tmp_path / "data", "<image>"), encoder_in(tmp_path), tmp_path, tmp_path / "spare")
    assert not (tmp_path / "data.index").exists()
