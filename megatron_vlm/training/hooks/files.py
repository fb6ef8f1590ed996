"""Files that a run adds to while it goes on: nothing is held back in a buffer, and a full disk is told in one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_vlm.errors import TrainingError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises TrainingError naming `path` where what runs inside cannot write it."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"checkpoint.directory: {path} cannot be written: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside and renames into place: readers see the old file or the new one. Raises TrainingError."""
    beside = path.with_name(f".{path.name}.partial")
    with writing(path):
        beside.write_bytes(content)
        os.replace(beside, path)


class AppendedFile:
    """A file whose every `write` is in the kernel's hands when it returns, so that a killed process loses none of it.

    Raises TrainingError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in close)

    def write(self, content: bytes) -> None:
        """Adds bytes at the end. Raises TrainingError."""
        rest = memoryview(content)
        with writing(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()
