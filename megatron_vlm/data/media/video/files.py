"""Reads frames: of a container (mp4, mkv, webm, whatever PyAV opens) or of a folder with an image file for each.

Frames that are wanted together are decoded together: the container is first asked for the keyframe before each, which
decodes nothing, and then read once from every keyframe that any of them needs. So a rank that encodes some frames of an
hour of video decodes the groups of frames around these, none of them twice.

Hazards: what a frame's number means must not depend on what else is read with it, else two layouts train on
different pixels. It is the first one shown at or after the number's time, less half a frame; and reading starts at a
keyframe shown before that time, which is not what a container's own search by decoding time gives. As with images, a
rotation that the container asks for is not applied. A file may also be a list of other files or of addresses in the
network (HLS, DASH, concat, SDP), whatever its name, and libav would open those: `CONTAINERS` are all that it may read,
and nothing but the file itself.
"""

import contextlib
import os
import re
from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media.images import MAX_PREPARED_PIXELS, MediaReader
from megatron_vlm.data.media.store import Location, MediaStore, Stored, check_location, open_location
from megatron_vlm.data.media.video.sampling import VideoFacts, frame_numbers, num_sampled
from megatron_vlm.data.sample import BadSample, Frame, ImageRef, Sample
from megatron_vlm.errors import one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
CONTAINERS = (
    "mov mp4 m4a 3gp 3g2 mj2 matroska webm avi mpeg mpegts mpegvideo ogg flv asf mxf nut gif apng h264 hevc m4v mjpeg "
    "obu av1 ivf dv yuv4mpegpipe wtv rm wav mp3 flac aac"  # the last without images, which is told then
).split()
ONLY_THIS_FILE = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
MISSING_SECONDS = 1.0  # at a video's end, where headers overstate its length: the last frame stands for what is missing


class Start(NamedTuple):
    """Start of decoding: the keyframe's decoding time, and a time that a search finds it by."""

    keyframe: int | None
    target: int


def count_frames(sample: Sample, store: MediaStore, sampling: VideoConfig) -> tuple[int, ...]:
    """Counts the frames taken of each of a sample's videos. Reads headers only. Raises BadSample as `survey`."""
    owner = f"{sample.origin}: sample {sample.id!r}"
    return tuple(num_sampled(survey(store.locate(video, owner), owner), sampling) for video in sample.videos)


def survey(video: Location, owner: str) -> VideoFacts:
    """Reads a video's header, or counts the image files of a folder.

    Raises:
        BadSample: there is no such file, it is no video or its header is damaged; names it and `owner`.
    """
    if (folder := _folder(video)) is not None:
        return VideoFacts(len(_list_images(folder, owner)), None)
    with _opened(video, owner) as (container, stream):
        return _read_facts(container, stream)


def read_images(
    reader: MediaReader, images: Sequence[ImageRef], store: MediaStore, owner: str
) -> Generator[Tensor, None, None]:
    """Pixels [3, H, W] of images: of one image file, or of any frames of one video in ascending order.

    Raises:
        BadSample: where the first that cannot be read comes; its reason is one of `media.FAULTS`.
    """
    first = images[0]
    location = store.locate(first, owner)
    if not isinstance(first, Frame):
        yield from (reader.read(location, owner) for _ in images)
    elif reader.blank:
        yield from (reader.blank_pixels() for _ in images)
    else:
        numbers = [image.number for image in images if isinstance(image, Frame)]
        if (folder := _folder(location)) is not None:
            files = _list_images(folder, owner)
            places = _frames_of(len(files), first, location, owner)
            yield from (reader.read(files[places[number]], owner) for number in numbers)
        else:
            for decoded in _decode(location, first, numbers, owner):
                with _told(location, owner, "damaged"):
                    pixels = reader.prepare(decoded)
                yield pixels


def _decode(location: Location, video: Frame, numbers: Sequence[int], owner: str) -> Iterator[Image.Image]:
    """RGB images of some of the video's sampled frames, ascending."""
    with _opened(location, owner) as (container, stream):
        facts = _read_facts(container, stream)
        frames = _frames_of(facts.num_frames, video, location, owner)
        rate, base = stream.average_rate, stream.time_base
        assert rate and base, "without them there are no facts"
        first = stream.start_time or 0
        times = [first + int((2 * frames[number] - 1) / (2 * rate) / base) for number in numbers]
        starts = ((_find_start(container, stream, time), time) for time in times)  # of a group while it is wanted
        for _, group in groupby(starts, key=lambda found: found[0].keyframe):
            together = list(group)
            container.seek(together[0][0].target, stream=stream)
            yield from _walk(container, stream, [time for _, time in together], int(MISSING_SECONDS / base))


def _walk(
    container: InputContainer, stream: VideoStream, times: Sequence[int], tolerance: int
) -> Iterator[Image.Image]:
    """Decodes on until the last time's frame. Raises ValueError where the video ends, or is damaged, before it."""
    wanted, last, num_found = list(times), None, 0
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        last = frame
        while num_found < len(wanted) and frame.pts >= wanted[num_found]:
            if frame.is_corrupt:
                raise ValueError(f"its frame at {frame.time:.2f} s is damaged")
            yield frame.to_image()
            num_found += 1
        if num_found == len(wanted):
            return
    for time in wanted[num_found:]:
        if last is None or last.pts is None or time - last.pts > tolerance:
            raise ValueError("it ends before its header says")
        yield last.to_image()


def _find_start(container: InputContainer, stream: VideoStream, time: int) -> Start:
    """A keyframe that is shown at `time` or before, else the video's beginning. Containers search by decoding time,
    which is earlier, so what they find may be shown too late; and some find what is no keyframe."""
    base = stream.time_base
    assert base
    time = max(time, stream.start_time or 0)
    target, last = time, None
    while True:
        container.seek(target, stream=stream)
        landing = None
        for packet in container.demux(stream):
            if packet.dts is None or packet.dts > time:
                break
            landing = packet.dts if landing is None else landing
            if packet.is_keyframe and (packet.pts is None or packet.pts <= time):
                return Start(packet.dts, target)
        if landing is None or landing == last:
            return Start(landing, target)
        last, target = landing, min(target, landing) - int(1 / base)


def _read_facts(container: InputContainer, stream: VideoStream) -> VideoFacts:
    """Frames and seconds by the header, or frames by duration and rate where it counts none."""
    rate, base = stream.average_rate, stream.time_base
    if not rate or not base:
        raise ValueError("its header names no frame rate")
    container_seconds = (container.duration or 0) / av.time_base
    seconds = float(stream.duration * base) if stream.duration else container_seconds
    num_frames = stream.frames or round(seconds * rate)
    if num_frames <= 0:
        raise ValueError("its header names neither frames nor a duration")
    return VideoFacts(num_frames, seconds or float(num_frames / rate))


def _frames_of(num_frames: int, video: Frame, location: Location, owner: str) -> list[int]:
    if num_frames < video.count:
        message = f"{owner}: video {location} has {num_frames} frames, {video.count} at least when it was indexed"
        raise BadSample(message, "damaged")
    return frame_numbers(num_frames, video.count)


def _folder(video: Location) -> Path | None:
    """The video's folder, where it is one of frames."""
    return Path(video) if not isinstance(video, Stored) and os.path.isdir(video) else None


def _list_images(folder: Path, owner: str) -> list[Path]:
    """A folder's image files, by name, numbers in it by their value."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    except OSError as error:
        raise BadSample(f"{owner}: video {folder} cannot be read: {error.strerror}", "damaged") from error
    if not names:
        wanted = ", ".join(IMAGE_SUFFIXES)
        raise BadSample(f"{owner}: video {folder} is a folder without images ({wanted})", "not a video")
    return [folder / name for name in sorted(names, key=_natural_order)]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", name)] + [(0, name)]


@contextlib.contextmanager
def _opened(video: Location, owner: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container with its header read; whatever is wrong with it, also inside the context, is a BadSample."""
    check_location(video, "video", owner)
    with contextlib.ExitStack() as stack, _told(video, owner, "damaged"):
        with _told(video, owner, "not a video"):
            file = stack.enter_context(open_location(video)) if isinstance(video, Stored) else f"file:{video}"
            container = stack.enter_context(av.open(file, "r", options=ONLY_THIS_FILE))
        if not container.streams.video:
            raise BadSample(f"{owner}: video {video} has no video stream", "not a video")
        stream = container.streams.video[0]
        size = stream.codec_context
        if size.width * size.height > MAX_PREPARED_PIXELS:
            message = f"{owner}: video {video} is too large to be decoded: frames of {size.width} x {size.height}"
            raise BadSample(f"{message} pixels, {MAX_PREPARED_PIXELS} are allowed", "bomb")
        yield container, stream


@contextlib.contextmanager
def _told(video: Location, owner: str, reason: str) -> Iterator[None]:
    """Turns whatever is raised into a BadSample: damaged bytes make decoders raise almost anything."""
    try:
        yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(f"{owner}: video {video} is too large to be decoded: {one_line(error)}", "bomb") from error
    except Exception as error:
        told = one_line(error)
        if reason == "not a video" and isinstance(error, av.ArgumentError):
            told = "it is in no format that is read as a video (lists of other files are not followed)"
        raise BadSample(f"{owner}: video {video} cannot be read: {told}", reason) from error
