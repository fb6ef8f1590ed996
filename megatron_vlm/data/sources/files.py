"""Sources whose records are bytes of local files: one file, the files of a folder, of a pattern, or a list of them.

Files are in the order of their names, those of a list in the list's. A record's key is its `Extent`.
"""

import glob
import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megatron_vlm.data.sample import RecordKey
from megatron_vlm.data.sources.base import Paths, Source
from megatron_vlm.errors import DataError
from megatron_vlm.runtime.files import check_regular, open_regular


class Extent(NamedTuple):
    """Key of a record: bytes from `offset` of a file, by its place in `files`, and the record's number in it (a line
    from 1, an element from 0)."""

    file: int
    offset: int
    size: int
    number: int


class FileSource(Source):
    """Local files of records.

    Args:
        path, image_token, options: as `Source`. Of a folder the files with one of `suffixes` are taken, not those of
            folders in it.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    unit = "line"

    def __init__(self, path: Paths, image_token: str, options: Mapping[str, Any] | None = None) -> None:
        if not isinstance(path, str | Path) and len(path) == 1:
            (path,) = path
        super().__init__(path, image_token, options)
        self.files = find_files(path, self.suffixes)
        self.name = name_of(path)
        if isinstance(path, str | Path) and self.files == (Path(path),):
            self.home, self.anchor = self.files[0].parent, self.files[0]
        elif isinstance(path, str | Path) and os.path.isdir(path):
            self.home, self.anchor = Path(path), Path(os.path.abspath(path))
        else:
            self.home = Path(os.path.commonpath([os.path.abspath(file.parent) for file in self.files]))
            digest = hashlib.sha256("\n".join(map(os.path.abspath, self.files)).encode()).hexdigest()
            self.anchor = self.home / f"{len(self.files)}_files_{digest[:8]}"

    @abstractmethod
    def places(self, path: Path) -> Iterable[tuple[int, int, int]]:
        """Yields offset, size and number of every record of a file. Raises DataError."""

    def scan(self) -> np.ndarray:
        """The keys of all records [n, 4]. Raises DataError."""
        return _together([self._keys(number, self.places(path)) for number, path in enumerate(self.files)])

    def first(self, count: int) -> np.ndarray:
        """The keys of the first records. Raises DataError."""
        parts: list[np.ndarray] = []
        for number, path in enumerate(self.files):
            if (left := count - sum(map(len, parts))) <= 0:
                break
            parts.append(self._keys(number, islice(self.first_places(path), left)))
        return _together(parts)

    def first_places(self, path: Path) -> Iterable[tuple[int, int, int]]:
        """Yields what `places` does of a file's beginning, at once."""
        return self.places(path)

    def read(self, key: RecordKey) -> bytes:
        """One record as its file has it. Raises DataError where the file is gone."""
        extent = Extent(*key)
        path = self.files[extent.file]
        try:
            with open_regular(path) as file:
                return os.pread(file.fileno(), extent.size, extent.offset)
        except OSError as error:
            raise DataError(f"data file {path} cannot be read: {error.strerror}") from error

    def number(self, key: RecordKey) -> str:
        """The record's number in its file, with the file's name where there are several."""
        extent = Extent(*key)
        return str(extent.number) if len(self.files) == 1 else f"{self.files[extent.file].name}:{extent.number}"

    def origin(self, key: RecordKey) -> str:
        """Name of the record in messages."""
        extent = Extent(*key)
        return f"{self.files[extent.file]} {self.unit_of(extent.file)} {extent.number}"

    def unit_of(self, _file: int) -> str:
        """Names what a record's number counts in a file."""
        return self.unit

    def fingerprint(self) -> list[Any]:
        """Size and time of every file, and the names of several."""
        found = []
        for path in self.files:
            try:
                facts = check_regular(path)
            except OSError as error:
                raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
            name = path.name if len(self.files) > 1 else ""
            found.append([name, facts.st_size, facts.st_mtime_ns])
        return found

    @staticmethod
    def _keys(file: int, places: Iterable[tuple[int, int, int]]) -> np.ndarray:
        """Keys [n, 4] of a file's records. A list of them all would take many times the array's memory."""
        flat = np.fromiter((value for place in places for value in place), np.int64).reshape(-1, 3)
        return np.concatenate([np.full((len(flat), 1), file, np.int64), flat], axis=1)


def _together(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty((0, len(Extent._fields)), np.int64), *parts])


def find_files(path: Paths, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The files that `data.path` names: itself, a folder's, those of a pattern (`shards/*.jsonl`), or all of a list. A
    single name is taken as it is, be it there or not.

    Raises:
        DataError: a folder or a pattern without a file of this kind, an empty list, or a file twice.
    """
    if not isinstance(path, str | Path):
        files = [file for one in path for file in find_files(one, suffixes)]
        if not files:
            raise DataError("data.path: found an empty list, needs files")
        if len(set(files)) < len(files):
            twice = next(file for number, file in enumerate(files) if file in files[:number])
            raise DataError(f"data.path: found {twice} twice in the list, needs each file once")
        return tuple(files)
    if os.path.isdir(path):
        try:
            names = sorted(name for name in os.listdir(path) if name.endswith(tuple(suffixes)))
        except OSError as error:
            raise DataError(f"data folder {path} cannot be read: {error.strerror}") from error
        files = [file for file in (Path(path) / name for name in names) if file.is_file()]
        if not files:
            raise DataError(f"data folder {path} holds no file that ends in {' or '.join(suffixes)}")
        return tuple(files)
    if glob.has_magic(str(path)) and not os.path.lexists(path):
        try:
            names = sorted(glob.glob(str(path), recursive=True))
        except ValueError as error:  # a null character
            raise DataError(f"no data file can be called like {path}: {error}") from error
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            raise DataError(f"no data file is called like {path}")
        return tuple(files)
    return (Path(path),)


def name_of(path: Paths) -> str:
    """Names a data set in messages."""
    return str(path) if isinstance(path, str | Path) else f"{path[0]} and {len(path) - 1} more"
