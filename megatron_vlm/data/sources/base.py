"""The interface of every source of conversations, and the table of sources.

A source is a file of records. It is scanned once for the place of every record; after that one record's bytes are read
and parsed at a time, by any worker process, so the file may be larger than memory. A source of your own derives from
`RecordFile`, says where records are (`scan`) and what one means (`parse`), and registers itself; the recipe names it in
`data.source` and its module in `extensions` (examples/extensions/own_source.py).

Hazard: a source is pickled into worker processes, so what it opens it opens where it is used.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_vlm.data.sample import Sample
from megatron_vlm.errors import DataError
from megatron_vlm.registry import Registry
from megatron_vlm.runtime.files import open_regular
from megatron_vlm.runtime.logging import get_logger

MOST_TOLD = 10  # remarks of a file, the most frequent ones


class Extent(NamedTuple):
    """Place of one record: bytes from `offset`, and its number (a line from 1, an element from 0)."""

    offset: int
    size: int
    number: int


class RecordFile(ABC):
    """One file of conversations.

    Args:
        path: of the file.
        image_token: the marker of an image in a text.
    """

    unit = "line"  # what a record's number counts, in error messages

    def __init__(self, path: str | Path, image_token: str) -> None:
        self.path = Path(path)
        self.image_token = image_token

    @abstractmethod
    def scan(self) -> list[Extent]:
        """The place of every record, in file order. Raises DataError where the file is of no use."""

    def first(self, count: int) -> list[Extent]:
        """The places of the first records, as many as there are of so many: a look before anything is built. A source
        whose `scan` takes long does well to find them without. Raises DataError."""
        return self.scan()[:count]

    @abstractmethod
    def parse(self, raw: bytes, origin: str, default_id: str) -> Sample:
        """A record's bytes -> its sample, with as many image markers in the users' turns as images, and as many video
        markers as videos, whose frames are counted and put in their places afterwards. Of one with neither the image
        marker, and of one without videos the video marker, is a text; but a sample is refused later that has one where
        an image or video would stand (`sample.marks_image`), as it has lost that.

        Args:
            origin: what to call the record in errors, and the sample's own.
            default_id: the sample's id where the record has none.

        Raises:
            BadSample: this record cannot be used, though others can.
        """

    def read(self, extent: Extent) -> Sample:
        """One conversation. Raises DataError where the file is gone, BadSample as `parse` does."""
        return self.parse(self.read_bytes(extent), self.origin(extent), str(extent.number))

    def read_bytes(self, extent: Extent) -> bytes:
        """One record as the file has it. Raises DataError where the file is gone."""
        try:
            with open_regular(self.path) as file:
                return os.pread(file.fileno(), extent.size, extent.offset)
        except OSError as error:
            raise DataError(f"data file {self.path} cannot be read: {error.strerror}") from error

    def read_all(self) -> list[Sample]:
        """Every conversation, in file order: for evaluation files."""
        return [self.read(extent) for extent in self.scan()]

    def origin(self, extent: Extent) -> str:
        """Name of the record in error messages."""
        return f"{self.path} {self.unit} {extent.number}"


def tell_remarks(path: Path, remarks: Mapping[str, int], num_records: int) -> None:
    """Warns once of a whole file's. `remarks`: each with the number of records that it is true of."""
    if not remarks:
        return
    ordered = sorted(remarks.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{remark} ({count})" for remark, count in ordered[:MOST_TOLD]]
    more = [f"and {len(ordered) - MOST_TOLD} more"] if len(ordered) > MOST_TOLD else []
    get_logger(__name__).warning("of the %d records of %s: %s", num_records, path, "; ".join([*told, *more]))


SOURCES: Registry[type[RecordFile]] = Registry("data source")
