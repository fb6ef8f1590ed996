"""Images and videos that would block, start a program, fill the memory or lead elsewhere are one sample's fault."""

import json
import os
import socket
import struct
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media.images import FAULTS, FORMATS, MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images, survey
from megatron_vlm.data.sample import BadSample, Frame
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.runtime.limits import bounded
from tests.helpers.data.videos import make_video
from tests.helpers.faults.odd_files import ODD

SPEC = MediaSpec(tokens_per_image=4, num_patches=4, height=28, width=28, mean=(0.5,) * 3, std=(0.5,) * 3)
READER = MediaReader(SPEC, "resize")
STRETCHED = replace(SPEC, processor=json.dumps({"image_processor_type": "SiglipImageProcessor", "size": [28, 28]}))


def refused(path: Path, reader: MediaReader = READER) -> BadSample:
    with pytest.raises(BadSample, match="^sample 's': image ") as caught:
        reader.read(path, "sample 's'")
    assert "\n" not in str(caught.value) and caught.value.reason in FAULTS
    return caught.value


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_neither_image_nor_video_nor_frame(tmp_path: Path, kind: str) -> None:
    make, expected = ODD[kind]
    (tmp_path / "frames").mkdir()
    image, video, frame = (make(tmp_path / name) for name in ("a.png", "a.mp4", "frames/0.png"))
    assert expected in str(refused(image))
    with pytest.raises(BadSample, match=r"sample 's': video .* cannot be read") as caught:
        survey(video, "sample 's'")
    assert expected in str(caught.value) and caught.value.reason in FAULTS
    if os.path.lexists(frame):
        with pytest.raises(BadSample, match=expected):
            list(read_images(READER, [Frame("frames", 0, 1)], MediaStore(tmp_path), "s"))


def strip(path: Path, width: int, height: int) -> Path:
    """A PNG of 1 bit a pixel, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(height * (1 + -(-width // 8))))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("reader", [READER, MediaReader(STRETCHED, "processor")], ids=["resize", "processor"])
def test_a_strip_that_grows_between_the_passes_of_a_resize(tmp_path: Path, reader: MediaReader) -> None:
    """173 kB on the disk; 28 x 89,000,000 pixels after the first pass."""
    path = strip(tmp_path / "a.png", 1, 89_000_000)
    error = refused(path, reader)
    assert error.reason == "bomb" and "1 x 89000000 pixels become 2492000000" in str(error)
    with pytest.raises(BadSample, match="too large to be decoded"):
        reader.check_header(path, "s")
    assert reader.read(strip(tmp_path / "b.png", 1, 50_000), "s").shape == (3, 28, 28)


def test_a_side_whose_weights_of_a_resize_fill_the_memory(tmp_path: Path) -> None:
    """49 kB on the disk; Pillow's bicubic takes 32 bytes of weights for each of 89,000,000 pixels."""
    error = refused(strip(tmp_path / "a.png", 89_000_000, 1))
    assert error.reason == "bomb" and "89000000 x 1 pixels, a side may have 16777216" in str(error)
    assert READER.read(strip(tmp_path / "b.png", 1_000_000, 1), "s").shape == (3, 28, 28)


def test_memory_that_an_image_lacks_is_the_images_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: object) -> None:
        raise MemoryError

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    make_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(Image.Image, "resize", lacks)
    assert refused(tmp_path / "a.png").reason == "damaged"
    with pytest.raises(BadSample, match=r"s: video .*a\.mp4 cannot be read: MemoryError"):
        list(read_images(READER, [Frame("a.mp4", 0, 3)], MediaStore(tmp_path), "s"))


def test_frames_that_grow_while_they_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr("megatron_vlm.data.media.images.MAX_PREPARED_PIXELS", 28 * 28)  # 28 x 32 between the passes
    with pytest.raises(BadSample, match="too large to be decoded: its 32 x 32 pixels become 896") as caught:
        list(read_images(READER, [Frame("a.mp4", 0, 3)], MediaStore(tmp_path), "s"))
    assert caught.value.reason == "bomb"


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes whatever begins with %!PS to Ghostscript."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    assert refused(path).reason == "not an image"
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError), Image.open(path) as file:  # without the list it would
        file.load()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_formats_that_are_trained_on(tmp_path: Path, format: str) -> None:
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "a", format)
    red, green, _ = READER.read(tmp_path / "a", "s").mean((1, 2))
    assert red > 0.9 and green < -0.9


def test_a_camera_s_jpeg_of_several_images(tmp_path: Path) -> None:
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    red.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (40, 40))])
    assert READER.read(tmp_path / "a.jpg", "s")[0].mean() > 0.9


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_other_formats_are_refused(tmp_path: Path, format: str) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png", format)
    assert refused(tmp_path / "a.png").reason == "not an image"


def test_a_header_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads a PPM's comment byte by byte: 50 MB of it took half a minute."""
    (tmp_path / "a.ppm").write_bytes(b"P6\n#" + b"a" * 2_000_000 + b"\n28 28\n255\n" + bytes(28 * 28 * 3))
    assert READER.read(tmp_path / "a.ppm", "s").shape == (3, 28, 28)
    monkeypatch.setattr("megatron_vlm.data.media.images.bounded", partial(bounded, seconds=0.05))
    assert "more than 0.05 s of processor time" in str(refused(tmp_path / "a.ppm"))


LISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
    "a.mp4": "ffconcat version 1.0\nfile {target}\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration='
    '"PT1S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1" width="32" height="32"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("target", ["other.mp4", "http://127.0.0.1:{port}/other.mp4"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_other_files_are_not_followed(tmp_path: Path, name: str, target: str) -> None:
    make_video(tmp_path / "other.mp4", 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = target.format(port=server.getsockname()[1])
        (tmp_path / name).write_text(LISTS[name].format(target=target))
        with pytest.raises(BadSample, match="cannot be read: ") as caught:
            survey(tmp_path / name, "s")
        assert caught.value.reason == "not a video"
        with pytest.raises(BlockingIOError):  # nobody asked
            server.accept()


@pytest.mark.parametrize("name", ["concat:a|b.mp4", "http:b.mp4", "frame%d.mp4", "-i.mp4", "subfile,,start,0,:a.mp4"])
def test_a_name_is_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = make_video(tmp_path / "made.mp4", 5)
    made.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert survey(Path(name), "s").num_frames == 5
    assert len(list(read_images(READER, [Frame(name, 0, VideoConfig().num_frames - 3)], MediaStore(Path()), "s"))) == 1
