"""Videos among what is asked about: each is shown as the frames that `data.video` of the model's recipe takes of it."""

import re
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media import MediaReader
from megatron_vlm.data.sample import VIDEO_TOKEN, Frame, Sample
from megatron_vlm.data.video.files import count_frames, read_pictures
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


class FrameReader:
    """Reads the frames among a prompt's pictures when they are asked for: those asked for in order in one pass through
    their video.

    Args:
        reader: prepares them.
        pictures: of the prompt, as `show_frames` gives them.
        owner: whom errors name.
    """

    def __init__(self, reader: MediaReader, pictures: Sequence[ImageSource | Frame], owner: str) -> None:
        self.reader, self.pictures, self.owner = reader, pictures, owner
        self._pass: Generator[Tensor, None, None] | None = None
        self._next: int | None = None  # the place whose pixels the pass under way gives next
        self._stop = 0  # the place behind its last

    def read(self, place: int) -> Tensor:
        """Pixels [3, H, W] of the frame at a place among the pictures. Raises BadSample as `read_pictures`."""
        if place != self._next:
            frames = self._from(place)
            self._pass, self._stop = read_pictures(self.reader, frames, Path(), self.owner), place + len(frames)
        self._next = None  # a pass that fails is over
        assert self._pass is not None
        pixels = next(self._pass)
        if place + 1 < self._stop:
            self._next = place + 1
        else:
            self._pass.close()  # and with it the file
        return pixels

    def _from(self, place: int) -> list[Frame]:
        """The frame there, and those of the same video right behind it."""
        frames: list[Frame] = []
        for picture in self.pictures[place:]:
            if not isinstance(picture, Frame) or (frames and not picture.follows(frames[-1])):
                break
            frames.append(picture)
        return frames
