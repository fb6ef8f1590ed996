"""The interface of every source of conversations, and the table of sources.

A source is one data set in one format: any number of files, or whatever else holds records. It lists its records once,
by keys of a few numbers each, of which the index keeps an array; after that one record at a time is read and parsed, by
any worker process. So a data set may be larger than memory, and records come in any order.

    scan()       [n, k] int64: the keys of all records, in the data set's order
    sample(key)  one record as a conversation

A source of your own derives from `Source`, or from `FileSource` (`files.py`) where records are bytes of local files,
and registers itself; the recipe names it in `data.source` and its module in `extensions`
(examples/extensions/own_source.py).

Hazard: a source is pickled into worker processes, so what it opens it opens where it is used.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from pydantic import ValidationError

from megatron_vlm.config.mixture import parts_of
from megatron_vlm.config.schema import DataConfig
from megatron_vlm.config.schema.base import Section
from megatron_vlm.data.sample import Embedded, Member, RecordKey, Sample
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.registry import Registry
from megatron_vlm.runtime.files import open_part
from megatron_vlm.runtime.logging import get_logger

MOST_TOLD = 10  # remarks of a data set, the most frequent ones
Paths = str | Path | Sequence[str]  # of a data set, as `data.path` names them


class Source(ABC):
    """One data set in one format.

    Args:
        path: a file, a folder, a pattern or a list of these, as the format allows.
        image_token: the marker of an image in a text.
        options: the format's own (`data.source_options`).

    Raises:
        ConfigError: an option that the format does not have, or a value of it that is of no use.
        DataError: nothing is there.

    Attributes:
        name: of the data set in messages.
        home: the folder that paths in records are relative to, where no other is named.
        anchor: the file or folder beside which the index is kept; None where that is none of this machine.
    """

    class Options(Section):
        """Options of the format: none."""

    unit: ClassVar[str] = "record"  # what a record's number counts, in messages
    name: str
    home: Path
    anchor: Path | None

    def __init__(self, path: Paths, image_token: str, options: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.image_token = image_token
        try:
            self.options = self.Options.model_validate(dict(options or {}))
        except ValidationError as error:
            raise ConfigError(_about_options(type(self), error)) from error

    @abstractmethod
    def scan(self) -> np.ndarray:
        """The keys of all records [n, k], int64, in the data set's order. Raises DataError where it is of no use."""

    def first(self, count: int) -> np.ndarray:
        """The keys of the first records, as many as there are of so many: a look before anything is built. A source
        whose `scan` takes long does well to find them without. Raises DataError."""
        return self.scan()[:count]

    @abstractmethod
    def read(self, key: RecordKey) -> Any:
        """One record as `parse` takes it. Raises DataError where it is gone, BadSample where it alone is damaged."""

    @abstractmethod
    def parse(self, raw: Any, key: RecordKey) -> Sample:
        """Turns what `read` gave into the sample, with as many image markers in the users' turns as images, and as many
        video markers as videos, whose frames are counted and put in their places afterwards. Of one with neither the
        image marker, and of one without videos the video marker, is a text; but a sample is refused later that has one
        where an image or video would stand (`sample.marks_image`), as it has lost that.

        Images and videos are paths; or, where the source holds them itself, a `Member` or `Embedded`, which `open` is
        given when they are wanted. Nothing of them is read here.

        Raises:
            BadSample: this record cannot be used, though others can.
        """

    def sample(self, key: RecordKey) -> Sample:
        """One conversation. Raises as `read` and `parse`."""
        return self.parse(self.read(key), key)

    def samples(self) -> Iterator[Sample]:
        """Every conversation, in order. Raises as `scan` and `sample`."""
        return map(self.sample, keys_of(self.scan()))

    def content(self, raw: Any) -> bytes:
        """Makes of what `read` gave bytes that differ where the record does: a resumed run knows it by them."""
        return bytes(raw)

    def open(self, media: Member | Embedded) -> BinaryIO:
        """An image or video that is part of a file or of a record. Raises OSError; DataError, BadSample as `read`."""
        assert isinstance(media, Member), f"{type(self).__name__} gives embedded media and does not open them"
        return open_part(media.file, media.offset, media.size)

    def number(self, key: RecordKey) -> str:
        """The record's number among all, or what else it is called where it has no id of its own."""
        return ":".join(map(str, key))

    def origin(self, key: RecordKey) -> str:
        """Name of the record in messages."""
        return f"{self.name} {self.unit} {self.number(key)}"

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """Lists, as JSON can hold it, all that the records depend on, such as each file's size and time: where it
        differs an index is built anew. Options, image marker and the source's class are added to it. Raises DataError
        where nothing is there."""


SOURCES: Registry[type[Source]] = Registry("data source")


def make_source(data: DataConfig, path: Paths | None) -> Source:
    """The source of a recipe's training data, as one part of its mixture has them, or of the held-out data, which are
    of the same format. Raises as `Source` and ConfigError: there is no such format."""
    assert path is not None, "a mixture is put in the place of its sources (config.mixture.parts_of)"
    return SOURCES.get(data.source)(path, data.image_token, data.source_options)


def is_here(data: DataConfig) -> bool:
    """Whether a recipe's training data are on this machine, all of them. Raises ConfigError as `make_source`."""
    try:
        for part in parts_of(data):
            make_source(part.data, part.data.path).fingerprint()
    except DataError:
        return False
    return True


def keys_of(keys: np.ndarray) -> Iterator[RecordKey]:
    """Keys [n, k] one by one."""
    return (tuple(key.tolist()) for key in keys)


def tell_remarks(name: str, remarks: Mapping[str, int], num_records: int) -> None:
    """Warns once of a whole data set's. `remarks`: each with the number of records that it is true of."""
    if not remarks:
        return
    ordered = sorted(remarks.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{remark} ({count})" for remark, count in ordered[:MOST_TOLD]]
    more = [f"and {len(ordered) - MOST_TOLD} more"] if len(ordered) > MOST_TOLD else []
    get_logger(__name__).warning("of the %d records of %s: %s", num_records, name, "; ".join([*told, *more]))


def _about_options(source: type[Source], error: ValidationError) -> str:
    """Names all that is wrong with `data.source_options`, in one line."""
    known = ", ".join(source.Options.model_fields) or "none"
    names = [name for name, found in SOURCES.items() if found is source]
    told = []
    for fault in error.errors():
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            told.append(f"{key!r} is no option of {names[0] if names else source.__name__} (it has: {known})")
        else:
            told.append(f"{key}: found {str(fault['input'])[:80]!r}: {fault['msg']}")
    return f"data.source_options: {'; '.join(told)}"
