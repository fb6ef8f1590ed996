"""Videos in prompts are their frames, in their places."""

from pathlib import Path

import pytest

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.sample import Frame
from megatron_vlm.errors import DataError
from megatron_vlm.generation.prompts import read_prompt
from megatron_vlm.generation.videos import show_frames
from tests.helpers.videos import make_folder, make_video, picture


def test_frames_stand_where_the_video_stood(tmp_path: Path) -> None:
    clip, still = make_video(tmp_path / "clip.MP4", 9), picture(3)
    prompt = [still, clip, "What is new?", still]
    sample, sources = show_frames(*read_prompt(prompt, "<image>", 1), VideoConfig(num_frames=2), "<image>")
    assert sources == [still, Frame(str(clip), 0, 2), Frame(str(clip), 1, 2), still]
    assert sample.turns[0].text == "<image>\n<image>\n<image>\nWhat is new?\n<image>"
    assert len(sample.images) == 4 and not sample.videos
    unseen = read_prompt([still, "What?"], "<image>", 1)
    assert show_frames(*unseen, VideoConfig(), "<image>") == unseen


def test_answers_are_those_to_the_frames(pair, tmp_path: Path) -> None:
    from megatron_vlm.data.video import files

    folder = make_folder(tmp_path / "frames", 3)
    frames = [folder / f"{number}.png" for number in range(3)]
    question, options = "how many near?", {"max_new_tokens": 8}
    wanted = pair.ours.generate([*frames, question], **options)
    assert pair.ours.generate([folder, question], **options) == wanted
    assert wanted != pair.ours.generate([*frames[::-1], question], **options)
    clip = make_video(tmp_path / "clip.mp4", 40, g="10", crf="10")
    decoded = list(files._decode(clip, Frame(str(clip), 0, 8), range(8), "s"))
    assert pair.ours.generate([str(clip), question], **options) == pair.ours.generate([*decoded, question], **options)


def test_a_video_that_is_none_is_named(pair, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("no video")
    with pytest.raises(DataError, match="prompt 1: sample '1': video .*clip.mp4 cannot be read"):
        pair.ours.generate([tmp_path / "clip.mp4", "What?"])
    with pytest.raises(DataError, match="image 'gone.mp4' does not exist"):
        pair.ours.generate(["gone.mp4", "What?"])
