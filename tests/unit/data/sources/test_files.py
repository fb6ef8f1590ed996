"""What a source is: many files are one data set, keys are numbers in an array, options and fingerprint are its own."""

import json
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlm.config.schema.base import Section
from megatron_vlm.data import sources
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.sample import RecordKey, Sample, Turn
from megatron_vlm.data.sources import SOURCES, FileSource, keys_of
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.unit.data.encoders import SPEC, encoder_in

QA = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A cat."}]


class Lines(FileSource):
    """A question per line; `answer` is the format's own option."""

    class Options(Section):
        answer: str = "yes"
        upper: bool = False

    suffixes = (".txt",)

    def places(self, path: Path) -> Iterator[tuple[int, int, int]]:
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield offset, len(line), number
                offset += len(line)

    def parse(self, raw: bytes, key: RecordKey) -> Sample:
        assert isinstance(self.options, self.Options)
        turns = (Turn("user", raw.decode().strip()), Turn("assistant", self.options.answer))
        return Sample(self.number(key), turns, (), self.origin(key))


def write_lines(folder: Path) -> list[Path]:
    """Three files, made in another order than that of their names, and one that is none of the format's."""
    folder.mkdir(exist_ok=True)
    for name, count in (("b.txt", 2), ("a.txt", 3), ("c.txt", 1), ("readme.md", 4)):
        (folder / name).write_text("".join(f"{name[0]}{number}?\n" for number in range(count)))
    return [folder / name for name in ("a.txt", "b.txt", "c.txt")]


def questions(source: FileSource) -> list[str]:
    return [sample.turns[0].text for sample in source.samples()]


def test_a_folder_a_pattern_and_a_list_are_the_same_data(tmp_path: Path) -> None:
    files = write_lines(tmp_path / "set")
    expected = ["a0?", "a1?", "a2?", "b0?", "b1?", "c0?"]
    for path in (tmp_path / "set", str(tmp_path / "set" / "*.txt"), list(map(str, files)), [str(tmp_path / "set")]):
        source = Lines(path, "<image>")
        assert questions(source) == expected and source.files == tuple(files)
        assert source.home == tmp_path / "set"
    assert questions(Lines([str(files[2]), str(files[0])], "<image>")) == ["c0?", "a0?", "a1?", "a2?"]
    mixed = Lines([str(tmp_path / "set" / "[ab].txt"), str(files[2])], "<image>")
    assert questions(mixed) == expected
    assert questions(Lines([str(files[1])], "<image>")) == ["b0?", "b1?"]


def test_keys_are_numbers_in_an_array(tmp_path: Path) -> None:
    """The array alone is kept of a data set; a key of it finds its record in any process."""
    write_lines(tmp_path / "set")
    source = Lines(tmp_path / "set", "<image>")
    keys = source.scan()
    assert keys.dtype == np.int64 and keys.shape == (6, 4)
    listed = list(keys_of(keys))
    assert listed == sorted(listed) and all(type(number) is int for key in listed for number in key)
    assert listed[3] == (1, 0, 4, 1)
    other = pickle.loads(pickle.dumps(source))
    assert other.sample(listed[3]) == source.sample(listed[3])
    assert other.sample(listed[3]).id == "b.txt:1"
    assert source.origin(listed[3]) == f"{tmp_path / 'set' / 'b.txt'} line 1"
    assert [key.tolist() for key in source.first(4)] == [list(key) for key in listed[:4]]
    assert len(source.first(100)) == 6


def test_keys_take_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * 40_000)
    source = LlavaJson(tmp_path / "a.jsonl", "<image>")
    tracemalloc.start()
    keys = source.scan()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(keys) == 40_000 and peak < 40_000 * 120  # a list of tuples of four numbers: over 230 each


def test_one_index_of_several_files(tmp_path: Path) -> None:
    files = write_lines(tmp_path / "set")
    encoder = encoder_in(tmp_path)

    def index(path: Any, **options: Any) -> Any:
        source = Lines(path, "<image>", options)
        return open_index(source, encoder, MediaStore.of(source, None), tmp_path / "spare")

    found = index(tmp_path / "set")
    assert found.folder.parent == tmp_path / "set.index" and len(found) == 6
    assert [found.sample_id(i) for i in (0, 3, 5)] == ["a.txt:1", "b.txt:1", "c.txt:1"]
    assert found.key(4) == (1, 4, 4, 2)
    assert index(tmp_path / "set").folder == found.folder
    listed = index(list(map(str, files)))
    assert listed.folder.parent.parent == tmp_path / "set" and listed.folder.parent.name.startswith("3_files_")
    assert listed.fingerprint_of_contents == found.fingerprint_of_contents
    turned = index([str(files[1]), str(files[0]), str(files[2])])
    assert turned.folder.parent != listed.folder.parent
    assert turned.fingerprint_of_contents["ids"] != found.fingerprint_of_contents["ids"]
    assert index(tmp_path / "set", answer="no").folder != found.folder
    os.utime(files[1], ns=(1, 1))  # of any of the files
    assert index(tmp_path / "set").folder != found.folder
    files[2].rename(tmp_path / "set" / "d.txt")
    again = index(tmp_path / "set")
    assert again.sample_id(5) == "d.txt:1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anser": "no"}, r"data\.source_options: 'anser' is no option of Lines \(it has: answer, upper\)"),
        ({"upper": "perhaps"}, r"data\.source_options: upper: found 'perhaps'"),
    ],
)
def test_options_are_the_formats_own(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_lines(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Lines(tmp_path, "<image>", options)
    with pytest.raises(ConfigError, match=r"'answer' is no option of llava_json \(it has: none\)"):
        LlavaJson(tmp_path, "<image>", {"answer": "no"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/empty", r"data folder \S+/empty holds no file that ends in \.txt"),
        ("{}/*.dat", r"no data file is called like \S+/\*\.dat"),
        ([], "data.path: found an empty list, needs files"),
        (["{}/a.txt", "{}/*.txt"], r"data\.path: found \S+/a\.txt twice in the list"),
        ("{}/a\0*.txt", r"no data file can be called like|no data file is called like"),
    ],
)
def test_paths_that_name_nothing(tmp_path: Path, path: Any, message: str) -> None:
    write_lines(tmp_path)
    (tmp_path / "empty").mkdir()
    path = path.format(tmp_path) if isinstance(path, str) else [one.format(tmp_path) for one in path]
    with pytest.raises(DataError, match=message):
        Lines(path, "<image>")


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    files = write_lines(tmp_path)
    source = Lines(tmp_path, "<image>")
    key = next(keys_of(source.scan()))
    files[0].unlink()
    for read in (lambda: source.sample(key), source.fingerprint):
        with pytest.raises(DataError, match=r"data file \S+a\.txt cannot be read: No such file"):
            read()


def test_the_working_directory_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    source = Lines(".", "<image>")
    assert source.anchor == tmp_path / "set" and len(questions(source)) == 6
    index = open_index(source, encoder_in(tmp_path), MediaStore.of(source, None), tmp_path / "spare")
    assert index.folder.parent == tmp_path / "set.index"


def test_data_cut_into_files_are_the_same_to_a_run(tmp_path: Path) -> None:
    """One file, and its halves as a list in the recipe: the steps are equal, and so is what a resumed run compares."""
    records = [json.dumps(record) for record in json.loads(tiny_dataset(tmp_path).read_text())]
    for name, part in (("whole", records), ("a", records[:10]), ("b", records[10:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    found = []
    for path in (str(tmp_path / "whole.jsonl"), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]):
        recipe = tiny_recipe(tmp_path, data={"path": path, "num_workers": 0})
        tokenizer = load_tokenizer(recipe.model.language.tokenizer, "<image>")
        items = build_loader(recipe, tokenizer, described(recipe, SPEC), GridSizes(), 0, 0, 3)
        steps = [(step.sample_ids, step.micro_batches[0].ids.tolist(), step.windows[0].pixels) for step in items]
        found.append((steps, items.producer.samples.index.fingerprint_of_contents))
    (whole, fingerprint), (cut, of_cut) = found
    assert fingerprint == of_cut and len(whole) == 3
    for ours, theirs in zip(whole, cut, strict=True):
        assert ours[:2] == theirs[:2] and torch.equal(ours[2], theirs[2])


def test_json_lists_and_lines_together(tmp_path: Path) -> None:
    """Ids that records lack are named by file and number, and places by what a file counts."""
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", "conversations": QA}, {"conversations": QA}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": QA}) + "\n")
    source = LlavaJson(tmp_path, "<image>")
    found = list(source.samples())
    assert [sample.id for sample in found] == ["x", "a.json:1", "b.jsonl:1"]
    assert [sample.origin.rpartition("/")[2] for sample in found] == [
        "a.json element 0",
        "a.json element 1",
        "b.jsonl line 1",
    ]


def test_the_folders_page_names_every_source() -> None:
    page = (Path(sources.__file__).parents[1] / "README.md").read_text()
    own = {
        name: source.__module__ for name, source in SOURCES.items() if source.__module__.startswith(sources.__name__)
    }
    assert len(own) >= 2
    for name, module in own.items():
        assert f"| `{name}` | `sources/{module.rpartition('.')[2]}.py`" in page, name
