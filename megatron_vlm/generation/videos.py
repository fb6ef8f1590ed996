"""Videos among what is asked about: each is shown as the frames that `data.video` of the model's recipe takes of it."""

import os
import re
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import count_frames, read_images
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import VIDEO_TOKEN, Embedded, Frame, ImageRef, Member, Sample
from megatron_vlm.generation.prompts import VIDEO_SUFFIXES, ImageSource


def is_video(image: ImageSource) -> bool:
    """Whether it is a container of a known kind, or a folder of frames."""
    return isinstance(image, Path) and (image.suffix.lower() in VIDEO_SUFFIXES or os.path.isdir(image))


def show_frames(
    sample: Sample, images: Sequence[ImageSource], sampling: VideoConfig, image_token: str
) -> tuple[Sample, list[ImageSource | Frame]]:
    """A prompt as `read_prompt` gives it -> the same with frames in the places of its videos.

    Raises:
        DataError: a video's header cannot be read; a video's marker stands where one would, and there is none.
    """
    if not any(map(is_video, images)):
        return with_frames(sample, (), image_token), list(images)
    rest = iter(images)

    def mark(found: re.Match[str]) -> str:
        image = next(rest, None)
        return VIDEO_TOKEN if image is not None and is_video(image) else found.group()

    turns = tuple(replace(turn, text=re.sub(re.escape(image_token), mark, turn.text)) for turn in sample.turns)
    videos = tuple(str(image) for image in images if is_video(image))
    stills = [image for image in images if not is_video(image)]
    marked = replace(sample, turns=turns, images=("",) * len(stills), videos=videos)
    shown = with_frames(marked, count_frames(marked, MediaStore(Path()), sampling), image_token)
    others = iter(stills)
    sources = [image if isinstance(image, Frame) else next(others) for image in shown.images]
    return replace(shown, images=tuple(map(str, sources))), sources


class ImageReader:
    """Reads files and frames of a conversation when they are asked for: frames asked for in order in one pass through
    their video.

    Args:
        reader: prepares them.
        images: of the conversation, in order; others than files and frames are not asked for.
        owner: whom errors name.
        store: where they are; default: paths from the working directory.
    """

    def __init__(
        self,
        reader: MediaReader,
        images: Sequence[ImageRef | ImageSource],
        owner: str,
        store: MediaStore | None = None,
    ) -> None:
        self.reader, self.images, self.owner = reader, images, owner
        self.store = store or MediaStore(Path())
        self._pass: Generator[Tensor, None, None] | None = None
        self._next: int | None = None  # the place whose pixels the pass under way gives next
        self._stop = 0  # the place behind its last

    def read(self, place: int) -> Tensor:
        """Pixels [3, H, W] of the image at a place. Raises BadSample as `read_images`."""
        if place != self._next:
            images = self._from(place)
            self._pass, self._stop = read_images(self.reader, images, self.store, self.owner), place + len(images)
        self._next = None  # a pass that fails is over
        assert self._pass is not None
        pixels = next(self._pass)
        if place + 1 < self._stop:
            self._next = place + 1
        else:
            self._pass.close()  # and with it the file
        return pixels

    def _from(self, place: int) -> list[ImageRef]:
        """The image there; if it is a frame, also those of the same video right behind it."""
        last = self.images[place]
        assert isinstance(last, str | Path | Member | Embedded | Frame)
        if not isinstance(last, Frame):
            return [str(last) if isinstance(last, Path) else last]
        together: list[ImageRef] = [last]
        for image in self.images[place + 1 :]:
            if not (isinstance(image, Frame) and image.follows(last)):
                break
            together.append(image)
            last = image
        return together
