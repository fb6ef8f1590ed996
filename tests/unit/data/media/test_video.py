"""Videos: which frames are taken, that each is the right one whatever is read with it, what is wrong with a file."""

from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media.images import FAULTS
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video import files
from megatron_vlm.data.media.video.files import read_images, survey
from megatron_vlm.data.media.video.sampling import VideoFacts, frame_numbers, num_sampled, with_frames
from megatron_vlm.data.sample import BadSample, Frame, Sample, Turn
from tests.helpers.data.videos import READER, SIDE, make_folder, make_video, told

KINDS = {  # name of the file, codec, options: what decides where decoding can start
    "b-frames": ("a.mp4", "libx264", {"g": "12", "bf": "3", "crf": "10"}),
    "open groups": ("b.mp4", "libx264", {"g": "10", "bf": "2", "crf": "10", "x264-params": "open-gop=1"}),
    "keyframes only": ("c.mkv", "libx264", {"g": "1", "crf": "10"}),
    "one group": ("d.mkv", "libx264", {"g": "1000", "bf": "2", "crf": "10"}),
    "old codec": ("e.mp4", "mpeg4", {"g": "9", "bf": "0", "b": "4000000"}),
    "web": ("f.webm", "libvpx-vp9", {"g": "16", "crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
    "stream": ("g.ts", "libx264", {"g": "12", "bf": "2", "crf": "10"}),
}
NUM_FRAMES = 100


def read(path: Path, numbers: list[int], count: int) -> list[int]:
    frames = [Frame(path.name, number, count) for number in numbers]
    return [told(pixels) for pixels in read_images(READER, frames, MediaStore(path.parent), "sample 's'")]


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert frame_numbers(100, 4) == [0, 33, 66, 99]
    assert frame_numbers(7, 7) == list(range(7)) and frame_numbers(9, 1) == [0]
    for count in range(1, 40):
        numbers = frame_numbers(40, count)
        assert len(set(numbers)) == count and numbers == sorted(numbers)
        assert numbers == [int(x + 0.5) for x in np.linspace(0, 39, count)] or count == 1


@pytest.mark.parametrize(
    ("num_frames", "seconds", "sampling", "count"),
    [
        (100, 4.0, {"num_frames": 8}, 8),
        (5, 0.2, {"num_frames": 8}, 5),
        (100, 4.0, {"num_frames": 8, "fps": 1.0}, 4),
        (100, 0.4, {"num_frames": 8, "fps": 1.0}, 1),
        (100, None, {"num_frames": 8, "fps": 1.0}, 8),
    ],
)
def test_how_many_frames_are_taken(num_frames: int, seconds: float | None, sampling: dict, count: int) -> None:
    assert num_sampled(VideoFacts(num_frames, seconds), VideoConfig(**sampling)) == count


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_the_same_whatever_is_read_with_it(tmp_path: Path, kind: str) -> None:
    name, codec, options = KINDS[kind]
    path = make_video(tmp_path / name, NUM_FRAMES, codec=codec, **options)
    assert survey(path, "s").num_frames == NUM_FRAMES
    everything = list(range(NUM_FRAMES))
    assert read(path, everything, NUM_FRAMES) == everything
    random = np.random.default_rng(3)
    for size in (1, 1, 1, 4, 20):
        some = sorted(random.choice(NUM_FRAMES, size, replace=False).tolist())
        assert read(path, some, NUM_FRAMES) == some
    assert read(path, [1, 2], 4) == [33, 66]


def test_together_means_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups of ten frames, those with a wanted frame are decoded, up to it and once."""
    path = make_video(tmp_path / "a.mp4", NUM_FRAMES, g="10", bf="0", sc_threshold="0", crf="10")
    walks: list[list[int]] = []
    walk = files._walk
    monkeypatch.setattr(files, "_walk", lambda *args: (walks.append(list(args[2])), walk(*args))[1])
    assert read(path, [3, 5, 7, 41, 42, 90], NUM_FRAMES) == [3, 5, 7, 41, 42, 90]
    assert [len(walk) for walk in walks] == [3, 2, 1]


def test_a_folder_is_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "frames", 12)
    (path / "notes.txt").write_text("no image")
    assert survey(path, "s") == VideoFacts(12, None)
    assert read(path, [0, 1, 2, 3], 4) == [0, 4, 7, 11]


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "missing": (lambda folder: folder / "none.mp4", "missing", "does not exist"),
    "text": (lambda folder: _text(folder / "a.mp4"), "not a video", "cannot be read"),
    "empty folder": (lambda folder: _folder(folder / "frames"), "not a video", "is a folder without images"),
    "sound": (lambda folder: _sound(folder / "a.wav"), "not a video", "has no video stream"),
}


def _text(path: Path) -> Path:
    path.write_text("hello")
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _sound(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return path


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_told_from_the_header(tmp_path: Path, kind: str) -> None:
    make, reason, message = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(BadSample, match=f"sample 's': video .*{path.name} {message}") as caught:
        survey(path, "sample 's'")
    assert caught.value.reason == reason and reason in FAULTS and "\n" not in str(caught.value)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(files, "MAX_PREPARED_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(BadSample, match="too large to be decoded: frames of 32 x 32 pixels") as caught:
        survey(path, "s")
    assert caught.value.reason == "bomb"


def test_a_video_that_ends_early_is_damaged_from_there_on(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", NUM_FRAMES, g="10", crf="10")
    spoil(path)
    found: list[int] = []
    frames = [Frame(path.name, number, NUM_FRAMES) for number in (2, 4, 99)]
    with pytest.raises(BadSample, match=r"a\.mkv cannot be read: ") as caught:
        for pixels in read_images(READER, frames, MediaStore(tmp_path), "s"):
            found.append(told(pixels))
    assert found == [2, 4] and caught.value.reason == "damaged"


def test_a_video_with_fewer_frames_than_were_indexed(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 5)
    with pytest.raises(BadSample, match="has 5 frames, 8 at least when it was indexed"):
        list(read_images(READER, [Frame("a.mp4", 2, 8)], MediaStore(tmp_path), "s"))


def test_markers_become_frames_in_their_places() -> None:
    turns = (Turn("user", "<image> then <video>\nand <image>?"), Turn("assistant", "yes"), Turn("user", "<video>"))
    sample = Sample("s", turns, ("a.png", "b.png"), "file", videos=("v.mp4", "w"))
    found = with_frames(sample, (2, 1), "<image>")
    assert found.turns[0].text == "<image> then <image>\n<image>\nand <image>?" and found.turns[2].text == "<image>"
    assert found.images == ("a.png", Frame("v.mp4", 0, 2), Frame("v.mp4", 1, 2), "b.png", Frame("w", 0, 1))
    assert not found.videos and str(found.images[1]) == "v.mp4 frame 1 of 2"
    with pytest.raises(BadSample, match=r"has 1 video\(s\) and 2 <video> in its text"):
        with_frames(Sample("s", turns, (), "file", videos=("v.mp4",)), (2,), "<image>")
