"""The directory of a run's checkpoints: what its names mean, and the only places that create, rename or remove any.

    step_0000100/            a checkpoint; it got this name when it was whole
    latest                   a file with the name of the newest
    .partial_step_0000100/   being written
    .replaced_step_0000100/  the one that stood there before, until the new one of that step does
    .removed_step_0000100/   being removed
    damaged_step_0000100/    found damaged on resume; nothing here looks at it again
    .run                     locked by the run that goes on here (claim.py)

One process per job changes it, rank 0; the others hear of it (`on_rank_zero`). Whatever is killed, and whenever, at
least one of the checkpoints that were there stays, under a name that the next start finds.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from megatron_vlm.checkpoint.integrity import sync_directory
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.errors import CheckpointError
from megatron_vlm.runtime.files import read_text

if TYPE_CHECKING:  # names and paths need no torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")
LATEST = "latest"
MAX_LATEST_BYTES = 256
_STEP = "step_"
_NAME = re.compile(rf"{_STEP}[0-9]{{1,20}}", re.ASCII)


def checkpoint_path(root: Path, step: int) -> Path:
    """Path of the checkpoint after `step` updates."""
    return root / f"{_STEP}{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Updates made before a checkpoint of a run's directory."""
    return int(checkpoint.name.removeprefix(_STEP))


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints of a run's directory, newest first."""
    found = [path for path in root.glob(f"{_STEP}*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def partial_path(final: Path) -> Path:
    """Path at which a checkpoint is written."""
    return final.with_name(f".partial_{final.name}")


def replaced_path(final: Path) -> Path:
    """Path of a checkpoint of the same step until its successor is in place."""
    return final.with_name(f".replaced_{final.name}")


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """A checkpoint directory: `path` itself, or the one `path/latest` names. Raises CheckpointError."""
    directory = latest_of(Path(path)) or Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: {directory} is not a directory")
    Manifest.read(directory)
    return directory


def latest_of(root: Path) -> Path | None:
    """The checkpoint that `root/latest` names, which lies beside it; None where there is no such file.

    Raises CheckpointError: it cannot be read, or names anything else.
    """
    pointer = root / LATEST
    if not os.path.lexists(pointer):
        return None
    try:
        name = read_text(pointer, MAX_LATEST_BYTES).strip()
    except OSError as error:
        raise CheckpointError(f"{pointer} cannot be read: {error.strerror}") from error
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{pointer}: found {name!r}, needs the name of a checkpoint beside it (step_0000100)")
    named = root / name
    if not named.exists() and replaced_path(named).exists():
        named = replaced_path(named)  # killed while it was being replaced
    if os.path.dirname(place := os.path.realpath(named)) != os.path.realpath(root):
        raise CheckpointError(f"{pointer}: found {name}, which is a link to {place}; needs what lies beside it")
    return named


def create_partial(final: Path) -> Path:
    """An empty directory to write a checkpoint into. Raises OSError."""
    partial = partial_path(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Gives a checkpoint its name, in place of one of the same step where there is one.

    Raises:
        OSError: it has no name yet.
        CheckpointError: it has, and is whole; what comes after that failed.
    """
    for directory in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync_directory(directory)
    replaced = replaced_path(final)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)  # a kill came between the renaming and the removal
        os.rename(final, replaced)
    os.rename(partial, final)
    _after(final, f"{final.parent / LATEST} could not be moved to it", lambda: point_to(final))
    if replaced.exists():
        _after(final, f"{replaced}, which it replaces, could not be removed", lambda: shutil.rmtree(replaced))


def _after(final: Path, problem: str, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise CheckpointError(f"checkpoint {final} is whole, but {problem}: {error}") from error


def point_to(checkpoint: Path) -> None:
    """Makes `latest` name this checkpoint. Raises OSError."""
    pointer = checkpoint.with_name(LATEST)
    temporary = pointer.with_name(f".{LATEST}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(checkpoint.name)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, pointer)
    sync_directory(checkpoint.parent)


def retire_all_but(root: Path, number: int) -> list[Path]:
    """Takes all checkpoints but the newest `number` out of the run's; returns what is to be removed. Raises OSError."""
    retired = []
    for checkpoint in checkpoints(root)[number:]:
        retired.append(checkpoint.with_name(f".removed_{checkpoint.name}"))  # half removed, it must not look like one
        os.rename(checkpoint, retired[-1])
    return retired


def set_aside(checkpoint: Path) -> None:
    """Takes a damaged checkpoint out of the run's, without removing it. Raises OSError."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(checkpoint, aside)


def tidy(root: Path) -> None:
    """Removes what a killed run was writing or removing, and finishes what it was renaming. Raises OSError."""
    for partial in root.glob(".partial_*"):
        shutil.rmtree(partial)
    for removed in root.glob(".removed_*"):
        shutil.rmtree(removed, ignore_errors=True)  # what cannot be removed is in nobody's way
    for replaced in root.glob(f".replaced_{_STEP}*"):
        final = replaced.with_name(replaced.name.removeprefix(".replaced_"))
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)


def on_rank_zero(action: Callable[[], T], world: "ProcessGroup", problem: str) -> T:
    """Runs `action` on rank 0 and returns its result (picklable) on every rank; a collective call.

    Raises:
        CheckpointError: on every rank, what `action` raised, an OSError as `problem` and its message.
    """
    from megatron_vlm.runtime.collectives import broadcast_object

    outcome: tuple[T | None, CheckpointError | None] | None = None
    if world.rank() == 0:
        try:
            outcome = action(), None
        except CheckpointError as error:
            outcome = None, error
        except OSError as error:
            outcome = None, CheckpointError(f"{problem}: {error}")
    result, failure = broadcast_object(outcome, world)
    if failure is not None:
        raise failure
    return cast(T, result)
