"""The frames of a video that are trained, known from its header alone; each is an image of the sample, and of the plan.

As VILA samples: `data.video.num_frames` frames spread evenly from the first to the last, all of them where there are no
more, and fewer where a short video would otherwise give more than `data.video.fps` a second. Which frames these are
depends on two numbers only, how many the video has and how many are taken; the index keeps the second, so that a text
can be laid out, packed and planned with no video opened.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.sample import VIDEO_TOKEN, BadSample, Frame, ImageRef, MediaRef, Sample, Turn, lacks_video


class VideoFacts(NamedTuple):
    """Facts of a video's header; `seconds` is None for a folder of frames."""

    num_frames: int
    seconds: float | None


def num_sampled(facts: VideoFacts, sampling: VideoConfig) -> int:
    """Number of frames that are taken, at least one."""
    most = min(sampling.num_frames, facts.num_frames)
    if not sampling.fps or facts.seconds is None:
        return most
    return min(most, max(1, int(facts.seconds * sampling.fps)))


def frame_numbers(num_frames: int, count: int) -> list[int]:
    """`count` frames spread evenly over all of them, the first and the last included; of one, the first."""
    gaps = max(1, count - 1)
    return [(2 * number * (num_frames - 1) + gaps) // (2 * gaps) for number in range(count)]  # rounded, halves up


def with_frames(sample: Sample, counts: Sequence[int], image_token: str) -> Sample:
    """The sample with each video's frames among its images, and in its texts an image marker for each, a line each,
    in the place of the video's marker.

    Args:
        counts: frames of each video.

    Raises:
        BadSample: the texts have another number of video markers than there are videos; or there are none, and a marker
            stands where one would (`lacks_video`).
    """
    if not sample.videos and not lacks_video(sample.turns, image_token):
        return sample
    found = sum(turn.text.count(VIDEO_TOKEN) for turn in sample.turns)
    if found != len(sample.videos):
        raise BadSample(
            f"{sample.origin}: sample {sample.id!r} has {len(sample.videos)} video(s) and {found} {VIDEO_TOKEN} in its "
            "text; equal is needed",
            "marker count",
        )
    videos, images = iter(zip(sample.videos, counts, strict=True)), iter(sample.images)
    shown: list[ImageRef] = []
    turns = [replace(turn, text="".join(_expand(turn, videos, images, image_token, shown))) for turn in sample.turns]
    return replace(sample, turns=tuple(turns), images=(*shown, *images), videos=())


def _expand(
    turn: Turn,
    videos: Iterator[tuple[MediaRef, int]],
    images: Iterator[ImageRef],
    image_token: str,
    shown: list[ImageRef],
) -> Iterator[str]:
    """The pieces of a turn's text; what its markers stand for is added to `shown`."""
    for piece in re.split(f"({re.escape(image_token)}|{re.escape(VIDEO_TOKEN)})", turn.text):
        if piece == VIDEO_TOKEN:
            video, count = next(videos)
            shown += [Frame(video, number, count) for number in range(count)]
            yield "\n".join([image_token] * count)
            continue
        if piece == image_token:
            shown += [image for image in [next(images, None)] if image is not None]
        yield piece
