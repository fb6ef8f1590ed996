"""Videos among what is asked about: each is shown as the frames that `data.video` of the model's recipe takes of it.

The ranks that encode frames read them one by one, not in one pass as training does: they are few here.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.sample import VIDEO_TOKEN, Frame, Sample
from megatron_vlm.data.video.files import count_frames
from megatron_vlm.data.video.sampling import with_frames
from megatron_vlm.generation.prompts import VIDEO_SUFFIXES, ImageSource


def is_video(image: ImageSource) -> bool:
    """Whether it is a container of a known kind, or a folder of frames."""
    return isinstance(image, Path) and (image.suffix.lower() in VIDEO_SUFFIXES or image.is_dir())


def show_frames(
    sample: Sample, images: Sequence[ImageSource], sampling: VideoConfig, image_token: str
) -> tuple[Sample, list[ImageSource | Frame]]:
    """A prompt as `read_prompt` gives it -> the same with frames in the places of its videos.

    Raises:
        DataError: a video's header cannot be read.
    """
    if not any(map(is_video, images)):
        return sample, list(images)
    rest = iter(images)

    def mark(found: re.Match[str]) -> str:
        image = next(rest, None)
        return VIDEO_TOKEN if image is not None and is_video(image) else found.group()

    turns = tuple(replace(turn, text=re.sub(re.escape(image_token), mark, turn.text)) for turn in sample.turns)
    videos = tuple(str(image) for image in images if is_video(image))
    pictures = [image for image in images if not is_video(image)]
    marked = replace(sample, turns=turns, images=("",) * len(pictures), videos=videos)
    shown = with_frames(marked, count_frames(marked, Path(), sampling), image_token)
    others = iter(pictures)
    sources = [image if isinstance(image, Frame) else next(others) for image in shown.images]
    return replace(shown, images=tuple(map(str, sources))), sources
