"""The places that images and videos of records are read from: paths below a folder, and what their source holds.

    MediaStore(Path("images"), source).locate("a/7.png")                          Path images/a/7.png
    MediaStore(Path("images"), source).locate(Member("0.tar", 512, 81, "7.png"))  Stored, opened by the source

A path of a record is joined with the root. Where the recipe names the root, a path may not lead out of it, by `..` or
by its own beginning; one that does is told, not read. Links in the folder are followed: data sets are made of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from megatron_vlm.data.sample import BadSample, Frame, ImageRef, Member
from megatron_vlm.data.sources.base import Source
from megatron_vlm.runtime.files import FileKindError, check_regular, open_regular

OUTSIDE = "outside"  # reason of a bad sample whose path leads out of the root


class Stored(NamedTuple):
    """An image or video that is no file of its own. `open`: may raise OSError and DataError."""

    name: str
    open: Callable[[], BinaryIO]

    def __str__(self) -> str:
        return self.name


Location = str | Path | Stored


@dataclass(frozen=True)
class MediaStore:
    """The places of one source's media.

    Args:
        root: the folder that paths in records are relative to.
        source: opens what it holds itself; None: there are only paths.
        confined: refuse paths that lead out of the root.
    """

    root: Path
    source: Source | None = None
    confined: bool = False

    @classmethod
    def of(cls, source: Source, media_root: str | os.PathLike[str] | None) -> "MediaStore":
        """The store of a source. `media_root`: None takes the source's own folder, from which paths may lead out."""
        return cls(source.home if media_root is None else Path(media_root), source, media_root is not None)

    def locate(self, media: ImageRef, owner: str) -> Location:
        """Finds where an image, or the video of a frame, is read. Raises BadSample naming `owner`: out of the root."""
        if isinstance(media, Frame):
            media = media.video
        if not isinstance(media, str):
            assert self.source is not None, f"{media} is of a source"
            name = f"{media.name} of {media.file}" if isinstance(media, Member) else media.name
            return Stored(name, partial(self.source.open, media))
        path = self.root / media
        if self.confined and not _is_below(path, self.root):
            message = (
                f"{owner}: {media} leads out of data.media_root {self.root}; needs a path inside it, or another root"
            )
            raise BadSample(message, OUTSIDE)
        return path

    def describe(self, media: ImageRef) -> str:
        """Names an image or video in messages and lists: a path with its root."""
        media = media.video if isinstance(media, Frame) else media
        return str(self.root / media) if isinstance(media, str) else str(media)


def _is_below(path: Path, root: Path) -> bool:
    """Whether a path is in a folder, as they are written: `a/../b` is b."""
    inner, outer = os.path.abspath(path), os.path.abspath(root)
    return os.path.commonpath([inner, outer]) == outer


def open_location(location: Location) -> BinaryIO:
    """Opens an image's or video's bytes. Raises OSError; FileKindError: no regular file; what its source raises."""
    return location.open() if isinstance(location, Stored) else open_regular(location)


def check_location(location: Location, kind: Literal["image", "video"], owner: str, advice: str = "") -> None:
    """Raises BadSample where an image's or video's path leads to nothing, or to what is no file (of a video: and no
    folder either); a named pipe would be waited for, for ever. What a source holds itself is known to be there."""
    if isinstance(location, Stored):
        return
    try:
        check_regular(location, or_directory=kind == "video")
    except FileKindError as error:
        reason = "not an image" if kind == "image" else "not a video"
        raise BadSample(f"{owner}: {kind} {location} cannot be read: {error.strerror}", reason) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample(f"{owner}: {kind} {location} does not exist{advice}", "missing") from error
    except OSError as error:  # as where a network folder is gone
        raise BadSample(f"{owner}: {kind} {location} cannot be read: {error.strerror}{advice}", "missing") from error
