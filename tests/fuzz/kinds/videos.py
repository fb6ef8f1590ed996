"""Videos: containers with headers that lie, playlists that lead elsewhere, folders of frames, and no videos."""

import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_vlm.config.schema import VideoConfig, VisionConfig
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images, survey
from megatron_vlm.data.media.video.sampling import num_sampled
from megatron_vlm.data.sample import Frame
from megatron_vlm.models.vision.survey import survey_tower
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.helpers.data.videos import make_folder, make_video
from tests.helpers.models.tiny import tiny_clip

CODECS = {"a.mp4": "libx264", "b.mkv": "libx264", "c.avi": "mpeg4", "d.webm": "libvpx", "e.ts": "mpeg2video"}
CODECS |= {"f.mov": "mjpeg", "g.flv": "flv", "h.mkv": "ffv1", "i.ogv": "libtheora"}
BOXES = (
    b"mvhd",
    b"tkhd",
    b"mdhd",
    b"stts",
    b"stsz",
    b"stsc",
    b"stco",
    b"stss",
    b"ctts",
    b"elst",
    b"avc1",
    b"avcC",
    b"dref",
)
BOXES += (b"trak", b"moov", b"mdat", b"ftyp", b"stsd", b"hdlr")


@dataclass(frozen=True)
class Base:
    """Good videos by name, a good frame, and a reader."""

    files: dict[str, bytes]
    frames: list[bytes]
    reader: MediaReader


def prepare(folder: Path) -> Base:
    media_spec = survey_tower(VisionConfig.model_validate({"config": tiny_clip()}), None).media_spec
    files = {}
    for name, codec in CODECS.items():
        try:
            files[name] = make_video(
                folder / name, 24, codec=codec, **({"g": "8"} if codec != "libtheora" else {})
            ).read_bytes()
        except Exception:  # not every build of FFmpeg has every encoder
            continue
    assert {"a.mp4", "c.avi"} <= files.keys()
    frames = [path.read_bytes() for path in sorted(make_folder(folder / "frames", 3).iterdir())]
    return Base(files, frames, MediaReader(media_spec, "pad"))


def make(random: Random, base: Base, folder: Path) -> Read:
    name = random.choice(list(base.files))
    path = folder / name
    kind = random.randrange(10)
    if kind == 0:
        hostile.in_its_place(random, path)
    elif kind == 1:
        path = _frames(random, base, folder / "clip")
    elif kind == 2:
        path = folder / random.choice(("a.m3u8", "a.mpd", "a.sdp", "a.ffconcat", "a.mp4", "a.pls", "a.asx", "a.txt"))
        (folder / "a.mp4x").write_bytes(base.files["a.mp4"])
        path.write_bytes(_playlist(random, hostile.port_of(folder)))
    elif kind < 6:
        path = folder / random.choice(("a.mp4", "a.mov"))
        path.write_bytes(_boxes(random, base.files["a.mp4"]))
    else:
        path.write_bytes(hostile.some_bytes(random, base.files[name]))
    count = random.choice((1, 8, 1_000))
    return lambda: _read(base.reader, path, count, folder)


def _read(reader: MediaReader, path: Path, count: int, root: Path) -> None:
    facts = survey(path, "a sample")
    number = num_sampled(facts, VideoConfig(num_frames=count))
    wanted = [Frame(path.name, frame, number) for frame in range(number)]
    for _ in read_images(reader, wanted[:40], MediaStore(root), "a sample"):
        pass


def _frames(random: Random, base: Base, folder: Path) -> Path:
    folder.mkdir()
    for number in range(random.choice((0, 1, 5))):
        (folder / f"{number}.png").write_bytes(random.choice(base.frames))
    spoilt = folder / random.choice(
        ("0.png", "3.png", "\x1b[2J1.jpg", "9" * 200 + ".png", "a.ppm", "\udc80.png", "x.txt")
    )
    if random.random() < 0.6:
        hostile.in_its_place(random, spoilt)
    else:
        spoilt.write_bytes(hostile.some_bytes(random, random.choice(base.frames)))
    return folder


def _boxes(random: Random, good: bytes) -> bytes:
    """An MP4 whose boxes say something else: durations, counts, sizes, rates."""
    spoilt = bytearray(good)
    for _ in range(random.choice((1, 1, 2, 3))):
        start = spoilt.find(random.choice(BOXES))
        if start < 0:
            continue
        place = start + random.choice((-4, 4, 8, 12, 16, 20, 24, 28, 32, 36, 76, 80, 84))
        number = random.choice((0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, random.randrange(2**32)))
        spoilt[max(place, 0) : place + 4] = struct.pack(">I", number)
    return bytes(spoilt)


def _playlist(random: Random, port: int) -> bytes:
    target = random.choice(
        (
            f"http://127.0.0.1:{port}/a.mp4",
            f"tcp://127.0.0.1:{port}",
            f"rtmp://127.0.0.1:{port}/a",
            f"https://127.0.0.1:{port}/a",
            f"rtp://127.0.0.1:{port}",
            f"concat:a.mp4x|http://127.0.0.1:{port}/b",
            "file:///etc/passwd",
            "/dev/zero",
            "../outside/secret.txt",
            "a.mp4x",
            "data:video/mp4;base64,AAAA",
            "crypto:a.mp4x",
            "subfile,,start,0,end,0,,:a.mp4x",
            "pipe:0",
        )
    )
    forms = (
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
        f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:9,\na.mp4x\n#EXT-X-ENDLIST\n',
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n",  # a live one, which is asked for again
        f"ffconcat version 1.0\nfile '{target}'\nduration 5\n" * random.choice((1, 2)),
        f"ffconcat version 1.0\nfile {random.choice(('a.ffconcat', 'a.mp4', 'a.mp4x'))}\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static' "
        "mediaPresentationDuration='PT9S'><Period><AdaptationSet mimeType='video/mp4'>"
        "<Representation id='1' bandwidth='1'>"
        f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
        f"{target}\n",
    )
    return random.choice(forms).encode()


VIDEOS = Kind("video", 400, prepare, make)
