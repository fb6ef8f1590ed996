"""The directory a conversion writes: nothing there is overwritten, and nothing half-written is left."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_vlm.checkpoint.directory import checkpoint_path, create_partial, partial_path
from megatron_vlm.conversion.native.writing import NativeWriter
from megatron_vlm.errors import ConversionError


def refuse_taken(destination: Path, but: Path | None = None) -> None:
    """Raises ConversionError where there is something already, `but` aside."""
    if destination.exists() and (not destination.is_dir() or any(path != but for path in destination.iterdir())):
        raise ConversionError(f"{destination} exists already; name a directory that does not, or is empty")


def refuse_taken_checkpoints(destination: Path) -> None:
    """Raises ConversionError where a directory of checkpoints to be holds more than what a killed import left."""
    refuse_taken(destination, but=partial_path(checkpoint_path(destination, 0)))


@contextlib.contextmanager
def first_checkpoint(destination: Path, advance: Callable[[int], None]) -> Iterator[NativeWriter]:
    """A writer of `destination/step_0000000`, beside its place; an error inside removes what was written.

    Args:
        destination: a directory of checkpoints to be; it does not exist, or is empty but for what a killed import left.
        advance: told the bytes of each tensor written, perhaps by several threads.

    Raises:
        ConversionError: the destination is taken, or the disk refuses.
    """
    final = checkpoint_path(destination, 0)
    refuse_taken_checkpoints(destination)
    new = [folder for folder in (destination, *destination.parents) if not folder.exists()]  # innermost first
    try:
        with refusals_of_the_disk(final):
            partial = create_partial(final)
        with NativeWriter(partial, advance) as writer:
            yield writer
    except BaseException:
        shutil.rmtree(destination if destination in new else partial_path(final), ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for folder in new[1:]:
                folder.rmdir()
        raise


@contextlib.contextmanager
def refusals_of_the_disk(path: Path) -> Iterator[None]:
    """Raises ConversionError where writing `path` meets an OSError."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{path} could not be written: {error}") from error
