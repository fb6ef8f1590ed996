"""One training conversation, as every source gives it: turns of text and the images and videos they mention."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from megatron_vlm.errors import DataError, one_line
from megatron_vlm.ops.labels import IGNORE as IGNORE  # of tokens that are not trained; all of data has it from here

VIDEO_TOKEN = "<video>"  # a video's marker in a text, where it is one by its record

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One side's turn; a user's text holds one marker per image or video, where it belongs, of a sample that has
    any. `trained`: of an answer, whether the model learns to say it; else it is only told."""

    role: Role
    text: str
    trained: bool = True


def marks_image(turn: Turn, marker: str, *others: str) -> bool:
    """Whether a turn holds the marker where loaders put images: at its beginning, or as its last line. If its sample
    has no images, they are lost; elsewhere, and in answers, such a sample speaks of the marker as of any word.

    Args:
        marker: of images, or of videos.
        others: markers beside which it may stand there, as an image's before a video's.
    """
    if turn.role == "assistant" or marker not in turn.text:
        return False
    markers = "|".join(map(re.escape, (marker, *others)))
    text = turn.text.strip()
    beginning = re.match(rf"(?:(?:{markers})\s*)*", text)
    if beginning is not None and marker in beginning.group():
        return True
    last = takewhile(re.compile(rf"\s*(?:(?:{markers})\s*)*").fullmatch, reversed(text.split("\n")[1:]))
    return any(marker in line for line in last)


def lacks_video(turns: Sequence[Turn], image_token: str) -> bool:
    """Whether, in turns of a sample without videos, a video's marker stands where one would be."""
    return image_token != VIDEO_TOKEN and any(marks_image(turn, VIDEO_TOKEN, image_token) for turn in turns)


def join_parts(pieces: Sequence[str]) -> str:
    """Texts and markers of one message as one text: a line break between two that no blank parts."""
    text = ""
    for piece in pieces:
        apart = text[-1:].strip() and piece[:1].strip()
        text += f"\n{piece}" if apart else piece
    return text


RecordKey = tuple[int, ...]  # a record's name within its source, which alone knows what the numbers mean


@dataclass(frozen=True)
class Member:
    """An image or video that is part of one of its source's files, as a member of a tar is.

    Args:
        file: path of the file, or its address; of the source's own making, never a text of a record.
        offset, size: its bytes in the file.
        name: what the file calls it.
    """

    file: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} of {self.file}"


@dataclass(frozen=True)
class Embedded:
    """An image or video whose bytes are in a record; its source reads them when they are wanted (`Source.open`).

    Args:
        record: the record's key.
        number: of it in the record, as the source counts.
        name: what to call it in messages.
    """

    record: RecordKey
    number: int
    name: str

    def __str__(self) -> str:
        return self.name


MediaRef = str | Member | Embedded  # a path as written in the record, or where else an image or video is read


@dataclass(frozen=True)
class Frame:
    """An image out of a video: one of `count` that are spread evenly over it (`video.sampling`).

    Args:
        video: the file, folder of frames, or where else it is read.
        number: of it among the `count`, from 0.
    """

    video: MediaRef
    number: int
    count: int

    def follows(self, other: "Frame") -> bool:
        """Whether it is a later one of the same frames of the same video."""
        return (self.video, self.count) == (other.video, other.count) and self.number > other.number

    def __str__(self) -> str:
        return f"{self.video} frame {self.number + 1} of {self.count}"


ImageRef = MediaRef | Frame


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Args:
        id: the file's own name for it, or its number in the file.
        turns: an optional system turn, then user and assistant in alternation, ending with the assistant.
        images: in the order of the markers.
        origin: where it stands ("train.json element 12"), for error messages.
        form: question form, by which evaluation reports; empty where the file names none.
        videos: in the order of their markers, as long as their frames are not counted; `video.sampling.with_frames`
            then puts these among the images.
        remarks: what a user is told of it once for all samples like it, as "key 'x' is unknown and ignored".
        source: number of its source in a mixture.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    origin: str
    form: str = ""
    videos: tuple[MediaRef, ...] = ()
    remarks: tuple[str, ...] = ()
    source: int = 0


def with_marker(sample: Sample, marker: str, other: str) -> Sample:
    """The sample with another marker of images, where it has images, or where one is marked and lacks; in one that has
    none the marker is a text, and stays."""
    if marker == other or not (sample.images or any(marks_image(turn, marker) for turn in sample.turns)):
        return sample
    turns = [
        turn if turn.role == "assistant" else replace(turn, text=turn.text.replace(marker, other))
        for turn in sample.turns
    ]
    return replace(sample, turns=tuple(turns))


class BadSample(DataError):
    """A sample that cannot be used while the others can: what `data.on_bad_sample: skip` leaves out.

    Args:
        reason: in a word or two, the same for all of the kind: they are counted by it.
    """

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def told_of(owner: str) -> Iterator[None]:
    """Turns what one sample makes Python refuse (its memory, its stack, an arithmetic without a result) into its own
    fault, and not the rank's: a BadSample that names `owner`."""
    try:
        yield
    except (MemoryError, RecursionError, ArithmeticError) as error:
        raise BadSample(f"{owner} cannot be used: {type(error).__name__}: {one_line(error)}") from error
