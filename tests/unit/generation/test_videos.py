"""Videos in prompts are their frames, in their places."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media.video import files
from megatron_vlm.data.sample import BadSample, Frame
from megatron_vlm.errors import DataError
from megatron_vlm.generation.prompts import read_prompt
from megatron_vlm.generation.videos import ImageReader, show_frames
from tests.helpers.data.videos import READER, make_folder, make_video, numbered, told


def test_frames_stand_where_the_video_stood(tmp_path: Path) -> None:
    clip, still = make_video(tmp_path / "clip.MP4", 9), numbered(3)
    prompt = [still, clip, "What is new?", still]
    sample, sources = show_frames(*read_prompt(prompt, "<image>", 1), VideoConfig(num_frames=2), "<image>")
    assert sources == [still, Frame(str(clip), 0, 2), Frame(str(clip), 1, 2), still]
    assert sample.turns[0].text == "<image>\n<image>\n<image>\nWhat is new?\n<image>"
    assert len(sample.images) == 4 and not sample.videos
    unseen = read_prompt([still, "What?"], "<image>", 1)
    assert show_frames(*unseen, VideoConfig(), "<image>") == unseen


@pytest.mark.parametrize("prompt", [["<video>\nWhat?"], [numbered(3), "<video>\nWhat?"], ["What?\n<video>"]])
def test_a_video_that_was_forgotten_is_told(prompt: list[Any]) -> None:
    with pytest.raises(DataError, match=r"^prompt 1: .*has 0 video\(s\) and 1 <video> in its text; equal is needed"):
        show_frames(*read_prompt(prompt, "<image>", 1), VideoConfig(), "<image>")
    speaking = read_prompt(["What is the <video> tag?"], "<image>", 1)
    assert show_frames(*speaking, VideoConfig(), "<image>") == speaking


def test_answers_are_those_to_the_frames(pair, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames", 3)
    frames = [folder / f"{number}.png" for number in range(3)]
    question, options = "how many near?", {"max_new_tokens": 8}
    wanted = pair.ours.generate([*frames, question], **options)
    assert pair.ours.generate([folder, question], **options) == wanted
    assert wanted != pair.ours.generate([*frames[::-1], question], **options)
    clip = make_video(tmp_path / "clip.mp4", 40, g="10", crf="10")
    decoded = list(files._decode(clip, Frame(str(clip), 0, 8), range(8), "s"))
    assert pair.ours.generate([str(clip), question], **options) == pair.ours.generate([*decoded, question], **options)


def test_frames_in_order_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, passes = make_video(tmp_path / "clip.mp4", 24, g="24", crf="10"), []
    decode = files._decode
    monkeypatch.setattr(files, "_decode", lambda *given: passes.append(list(given[2])) or decode(*given))
    still = numbered(7)
    prompt = [clip, still, clip, "What?"]
    _, sources = show_frames(*read_prompt(prompt, "<image>", 1), VideoConfig(num_frames=4), "<image>")
    frames = ImageReader(READER, sources, "prompt 1")

    def read(*places: int) -> list[int]:
        return [told(frames.read(place)) for place in places]

    whole = read(0, 1, 2, 3)
    assert passes == [[0, 1, 2, 3]] and whole == sorted(whole) and len(set(whole)) == 4
    assert read(5, 6) == whole[:2] and read(2, 3, 1) == [whole[2], whole[3], whole[1]]
    assert passes[1:] == [[0, 1, 2, 3], [2, 3], [1, 2, 3]]


def test_a_video_that_was_read_is_closed(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 8, g="8")
    open_files = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    before = open_files()
    readers = [ImageReader(READER, [Frame(str(clip), number, 2) for number in range(2)], "s") for _ in range(3)]
    for frames in readers:
        frames.read(0)
    assert open_files() == before + 3
    for frames in readers:
        frames.read(1)
    assert open_files() == before


def test_a_frame_that_fails_fails_again(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", 48, g="8", crf="10")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = ImageReader(READER, [Frame(str(path), number, 8) for number in range(8)], "s")
    assert [told(frames.read(0)), told(frames.read(1))] == [0, 7]
    for _ in range(2):
        with pytest.raises(BadSample, match="ends before its header says"):
            frames.read(7)


def test_a_video_that_is_none_is_named(pair, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("no video")
    with pytest.raises(DataError, match="prompt 1: sample '1': video .*clip.mp4 cannot be read"):
        pair.ours.generate([tmp_path / "clip.mp4", "What?"])
    with pytest.raises(DataError, match="image 'gone.mp4' does not exist"):
        pair.ours.generate(["gone.mp4", "What?"])
