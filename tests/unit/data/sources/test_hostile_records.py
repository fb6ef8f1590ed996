"""Records that would end a run in a traceback, or block it, are one sample's fault, and `skip` leaves them out."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlm.data.index.building import BadSamplePolicy
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.sample import BadSample
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import DataError
from tests.helpers.faults.odd_files import ODD
from tests.unit.data.encoders import SPEC, encoder_in

TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
GOOD = json.dumps({"id": "good", "image": "good.png", "conversations": TALK}).encode()
HALF = b"\xed\xa0\x80"  # half of a pair, as CESU-8 writes it
BYTES = {
    "half in an id": b'{"id":"' + HALF + b'","conversations":' + json.dumps(TALK).encode() + b"}",
    "half in a text": GOOD.replace(b'"q"', b'"' + HALF + b'"'),
    "half in a key": GOOD.replace(b'"id"', b'"' + HALF + b'"'),
    "half, escaped": GOOD.replace(b'"q"', rb'"\ud800"'),
    "Latin-1": GOOD.replace(b'"q"', b'"\xe9"'),
    "deep": GOOD.replace(b'"good"', b"[" * 100_000 + b"]" * 100_000),
    "a number without end": GOOD.replace(b'"good"', b"9" * 10_000),
}


def index_of(folder: Path, *records: bytes, skips: bool = True) -> SampleIndex:
    path = folder / "data.jsonl"
    Image.new("RGB", (28, 28)).save(folder / "good.png")
    path.write_bytes(b"\n".join(records))
    rule = BadSamplePolicy(MediaReader(SPEC, "pad"), 128) if skips else None
    return open_index(LlavaJson(path, "<image>"), encoder_in(folder), MediaStore(folder), folder / "spare", skip=rule)


def check_left_out(folder: Path, record: bytes, reason: str, message: str) -> None:
    index = index_of(folder, GOOD, record, GOOD.replace(b'"good"', b'"last"'))
    assert [index.sample_id(number) for number in range(len(index))] == ["good", "last"]
    assert index.dropped == {reason: 1} and message in (index.folder / "dropped.jsonl").read_text()
    with pytest.raises(BadSample, match=r"data\.jsonl line 2") as caught:
        index_of(folder, GOOD, record, skips=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_text(tmp_path: Path, name: str) -> None:
    check_left_out(tmp_path, BYTES[name], "malformed", "line 2 is not JSON: ")


@pytest.mark.parametrize("key", ["image", "video"])
@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "half a character"])  # is told as a text before
def test_paths_that_lead_to_no_file(tmp_path: Path, kind: str, key: str) -> None:
    make, message = ODD[kind]
    path = make(tmp_path / "a.png")
    record = json.dumps({"id": "odd", key: path.name, "conversations": TALK}).encode()
    reason = {"image": "not an image", "video": "not a video"}[key]
    check_left_out(tmp_path, record, "missing" if kind in ("circle", "long name") else reason, message)


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), ZeroDivisionError("by zero")])
def test_what_python_refuses_is_the_samples_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    encode = ConversationEncoder.encode

    def fail(self: ConversationEncoder, sample: Any) -> Any:
        if sample.id == "odd":
            raise error
        return encode(self, sample)

    monkeypatch.setattr(ConversationEncoder, "encode", fail)
    check_left_out(tmp_path, GOOD.replace(b'"good"', b'"odd"'), "malformed", f"cannot be used: {type(error).__name__}")


@pytest.mark.parametrize("kind", ODD)
def test_data_files_that_are_none(tmp_path: Path, kind: str) -> None:
    make, message = ODD[kind]
    file = LlavaJson(make(tmp_path / "a.json"), "<image>")
    store = MediaStore(tmp_path)
    for read in (
        lambda: list(file.samples()),
        lambda: open_index(file, encoder_in(tmp_path), store, tmp_path / "spare"),
    ):
        with pytest.raises(DataError, match=f"data file .* cannot be read: .*{message}"):
            read()


def test_a_data_file_that_the_memory_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 1 << 40)  # sparse: no room on the disk
    with pytest.raises(DataError, match=r"a\.json has 1,099,511,627,776 bytes; to index it takes twice the memory"):
        LlavaJson(tmp_path / "a.json", "<image>").scan()


@pytest.mark.parametrize("name", ["a\0b", "circle"])
def test_media_roots_that_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "data.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"data\.media_root: found .*, needs the name of a folder"):
        open_index(
            LlavaJson(tmp_path / "data.jsonl", "<image>"),
            encoder_in(tmp_path),
            MediaStore(tmp_path / name),
            tmp_path / "spare",
        )


@pytest.mark.parametrize("name", ["samples.npy", "ids.bin", "frames.npy", "contents.json", "dropped.jsonl"])
def test_an_index_that_would_block_is_damaged(tmp_path: Path, name: str) -> None:
    folder = index_of(tmp_path, GOOD).folder
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match="is damaged .*is a named pipe"):
        open_index(
            LlavaJson(tmp_path / "data.jsonl", "<image>"),
            encoder_in(tmp_path), MediaStore(tmp_path), tmp_path / "spare",
            skip=BadSamplePolicy(MediaReader(SPEC, "pad"), 128),
        )  # fmt: skip
