"""Where images and videos are read from: a path, a part of a file, or bytes of the record; alike, and alike guarded."""

import base64
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.index.building import BadSamplePolicy
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.media.images import FAULTS, MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import count_frames, read_images
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import BadSample, Embedded, Frame, Member, Sample
from megatron_vlm.data.sources import keys_of
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.runtime.files import open_part
from tests.helpers.data.videos import READER, make_video, told
from tests.unit.data.encoders import SPEC, encoder_in

QA = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A cat."}]


class InTar(LlavaJson):
    """Images and videos are members of a tar beside the JSON file, by name."""

    def parse(self, raw: bytes, key: tuple[int, ...]) -> Sample:
        sample = self.parse_texts(raw, key)
        archive = str(self.home / "media.tar")
        with tarfile.open(archive) as file:
            places = {one.name: (one.offset_data, one.size) for one in file.getmembers()}

        def member(name: object) -> Member:
            return Member(archive, *places[str(name)], str(name))

        return Sample(
            sample.id, sample.turns, tuple(map(member, sample.images)), sample.origin, "",
            tuple(map(member, sample.videos)),
        )  # fmt: skip


def png_bytes(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write(folder: Path, record: dict, name: str = "a.json") -> Path:
    path = folder / name
    path.write_text(json.dumps([{"conversations": QA, **record}]))
    return path


def pack(folder: Path, **members: bytes) -> None:
    with tarfile.open(folder / "media.tar", "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def one_sample(source: LlavaJson) -> Sample:
    (sample,) = source.samples()
    return pickle.loads(pickle.dumps(sample))  # as a worker is given it


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_three_ways_to_the_same_pixels(tmp_path: Path) -> None:
    content = png_bytes()
    (tmp_path / "7.png").write_bytes(content)
    pack(tmp_path, other=png_bytes(1), seven=content, last=b"x" * 700)
    reader, found = MediaReader(SPEC, "pad"), []
    cases = (
        (LlavaJson(write(tmp_path, {"image": "7.png"}), "<image>"), str),
        (InTar(write(tmp_path, {"image": "seven"}, "b.json"), "<image>"), Member),
    )
    for source, kind in cases:
        sample = one_sample(source)
        assert isinstance(sample.images[0], kind)
        found += read_images(reader, sample.images, MediaStore.of(source, None), "s")
    source = LlavaJson(write(tmp_path, {"image": [uri(png_bytes(1)), uri(content)]}), "<image>")
    sample = one_sample(source)
    assert all(isinstance(image, Embedded) for image in sample.images)
    assert len(pickle.dumps(sample)) < 1000 < len(content)  # a reference, whatever it is of
    store = MediaStore.of(source, None)
    found += [*read_images(reader, sample.images[1:], store, "s")]
    (other,) = read_images(reader, sample.images[:1], store, "s")
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and not torch.equal(found[0], other)


def test_a_record_is_parsed_once_for_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents, calls = [png_bytes(seed) for seed in range(4)], []
    records = [{"conversations": QA, "image": [uri(one) for one in part]} for part in (contents[:3], contents[3:])]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = LlavaJson(tmp_path / "a.json", "<image>")
    images = [image for sample in source.samples() for image in sample.images]
    read = LlavaJson.read
    monkeypatch.setattr(LlavaJson, "read", lambda self, key: (calls.append(key), read(self, key))[1])
    found = [source.open(image).read() for image in (*images, images[0])]
    assert found == [*contents, contents[0]] and [key[-1] for key in calls] == [0, 1, 0]


def test_frames_of_a_video_in_an_archive(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 30, g="7", crf="10")
    pack(tmp_path, first=b"x" * 3000, clip=path.read_bytes(), last=b"y" * 3000)
    sampling = VideoConfig(num_frames=4)
    for source in (
        InTar(write(tmp_path, {"video": "clip"}, "b.json"), "<image>"),
        LlavaJson(write(tmp_path, {"video": uri(path.read_bytes(), "video/mp4")}), "<image>"),
    ):
        store, sample = MediaStore.of(source, None), one_sample(source)
        counts = count_frames(sample, store, sampling)
        frames = with_frames(sample, counts, "<image>").images
        assert counts == (4,) and all(isinstance(frame, Frame) for frame in frames)
        assert [told(pixels) for pixels in read_images(READER, frames, store, "s")] == [0, 10, 19, 29]


def test_an_index_of_what_is_in_archives_and_records(tmp_path: Path) -> None:
    """Measured as files are, under the rule for bad samples too, and a damaged one is left out under its reason."""
    pack(tmp_path, seven=png_bytes(), rubbish=b"no image at all")
    records = [
        {"id": "member", "conversations": QA, "image": "seven"},
        {"id": "rubbish", "conversations": QA, "image": "rubbish"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source, skip = InTar(tmp_path / "a.json", "<image>"), BadSamplePolicy(MediaReader(SPEC, "pad"), 200)
    index = open_index(source, encoder_in(tmp_path), MediaStore.of(source, None), tmp_path / "spare", skip=skip)
    assert [index.sample_id(i) for i in range(len(index))] == ["member"] and index.images.tolist() == [1]
    assert index.dropped == {"not an image": 1}
    (line,) = map(json.loads, (index.folder / "dropped.jsonl").read_text().splitlines())
    assert line["images"] == [f"rubbish of {tmp_path / 'media.tar'}"]
    damaged = {"id": "no base64", "conversations": QA, "image": "data:image/png;base64,????"}
    good = {"id": "embedded", "conversations": QA, "image": uri(png_bytes())}
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(damaged)}\n")
    embedded = LlavaJson(tmp_path / "b.jsonl", "<image>")
    index = open_index(embedded, encoder_in(tmp_path), MediaStore.of(embedded, None), tmp_path / "spare", skip=skip)
    assert [index.sample_id(i) for i in range(len(index))] == ["embedded"] and index.dropped == {"damaged": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(png_bytes()[:60], "damaged"), (b"", "not an image"), (b"%!PS-Adobe", "not an image")],
    ids=["cut", "empty", "another format"],
)
def test_hostile_bytes_are_refused_wherever_they_are(tmp_path: Path, content: bytes, reason: str) -> None:
    pack(tmp_path, seven=content)
    (tmp_path / "7.png").write_bytes(content)
    reader, reasons = MediaReader(SPEC, "pad"), []
    for source in (
        LlavaJson(write(tmp_path, {"image": "7.png"}), "<image>"),
        InTar(write(tmp_path, {"image": "seven"}, "b.json"), "<image>"),
        LlavaJson(write(tmp_path, {"image": uri(content)}, "c.json"), "<image>"),
    ):
        (key,) = keys_of(source.scan())
        with pytest.raises(BadSample) as caught:
            list(read_images(reader, source.sample(key).images, MediaStore.of(source, None), "sample 's'"))
        assert caught.value.reason in FAULTS and str(caught.value).startswith("sample 's': image ")
        reasons.append(caught.value.reason)
    assert reasons == [reason] * 3


@pytest.mark.parametrize("path", ["../out.png", "a/../../out.png", "{}/out.png", "/etc/hostname"])
def test_no_path_leads_out_of_the_media_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "out.png").write_bytes(png_bytes())
    source = LlavaJson(write(tmp_path, {"image": path.format(tmp_path)}), "<image>")
    store = MediaStore.of(source, str(tmp_path / "root"))
    sample = one_sample(source)
    with pytest.raises(BadSample, match=r"leads out of data\.media_root \S+/root; needs a path inside it") as caught:
        list(read_images(MediaReader(SPEC, "pad"), sample.images, store, "s"))
    assert caught.value.reason in FAULTS
    with pytest.raises(BadSample, match=r"leads out of data\.media_root"):
        open_index(source, encoder_in(tmp_path), store, tmp_path / "spare")
    with pytest.raises(BadSample, match=r"leads out of data\.media_root"):
        store.locate(Frame(path.format(tmp_path), 0, 2), "s")


@pytest.mark.parametrize("path", ["7.png", "a/../7.png", "{}/root/7.png", "./7.png"])
def test_what_is_inside_is_read_however_it_is_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "7.png").write_bytes(png_bytes())
    source = LlavaJson(write(tmp_path, {"image": path.format(tmp_path)}), "<image>")
    store = MediaStore.of(source, tmp_path / "root")
    assert len(list(read_images(MediaReader(SPEC, "pad"), one_sample(source).images, store, "s"))) == 1


def test_an_address_in_the_network_is_no_path(tmp_path: Path) -> None:
    source = LlavaJson(write(tmp_path, {"image": "https://example.com/7.png"}), "<image>")
    with pytest.raises(BadSample, match="an address in the network; the path of a file is needed"):
        list(source.samples())
    (tmp_path / "7.png").write_bytes(png_bytes())
    source = LlavaJson(write(tmp_path, {"image": f"file://{tmp_path}/7.png"}), "<image>")
    assert one_sample(source).images == (f"{tmp_path}/7.png",)


def test_a_part_of_a_file_reads_as_a_file(tmp_path: Path) -> None:
    data = bytes(range(200))
    (tmp_path / "whole").write_bytes(data)

    def check(part: BinaryIO, expected: bytes) -> None:
        with part:
            assert part.read() == expected and part.read() == b""
            assert part.seek(-3, 2) == len(expected) - 3 and part.read(2) == expected[-3:-1]
            assert part.seek(5) == 5 and part.tell() == 5 and part.read(1) == expected[5:6]
            assert part.seek(1, 1) == 7 and part.read() == expected[7:]
            assert part.seek(len(expected) + 9) and part.read() == b""
            with pytest.raises(OSError, match="before the beginning"):
                part.seek(-1)

    check(open_part(tmp_path / "whole", 50, 30), data[50:80])
    check(open_part(tmp_path / "whole", 150, 10**12), data[150:])  # a size beyond the file's end is not believed
    with open_part(tmp_path / "whole", 500, 30) as beyond:
        assert beyond.read() == b""
