"""The start of a run: the newest good checkpoint of its own directory, else what the recipe names, else nothing.

Good means that the manifest is what was written, and every file what it says; the ranks share the reading. One that is
not is passed over for the one before it and renamed, so that it is neither met again nor counted among those to keep.
Nothing is renamed where none is good: then the run does not start, because to begin from the first step would not be
what was asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from torch.distributed import ProcessGroup

from megatron_vlm.checkpoint.directory import checkpoints, find_checkpoint, on_rank_zero, point_to, set_aside, tidy
from megatron_vlm.checkpoint.integrity import find_damage
from megatron_vlm.checkpoint.manifest import Manifest, OtherFormatError
from megatron_vlm.config import config_from_tree
from megatron_vlm.config.recipe_changes import refuse_data_changes, refuse_recipe_changes
from megatron_vlm.config.schema import CheckpointConfig, Config
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.runtime.logging import get_logger

T = TypeVar("T")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from; its files have been compared with its manifest."""

    directory: Path
    manifest: Manifest
    states: Literal["all", "model"]

    def check_recipe(self, config: Config) -> None:
        """Raises ConfigError where a run is to go on under a recipe with another meaning."""
        if self.states == "all":
            # what it names under `extensions` is imported by no one; what those bring is named by other keys
            tree = self.manifest.config | {"extensions": config.extensions}
            saved = config_from_tree(tree, f"{self.directory}/manifest.json")
            refuse_recipe_changes(saved, config, str(self.directory))

    def check_data(self, fingerprint: dict[str, int | str] | None, config: Config) -> None:
        """Raises ConfigError where a run is to go on with other training samples."""
        if self.states == "all":
            refuse_data_changes(self.manifest.data_fingerprint, fingerprint, config, str(self.directory))


def find_start(config: CheckpointConfig, world: ProcessGroup, owns: bool = True) -> Start | None:
    """Finds the start by `checkpoint.resume`, `load` and `load_states`; a collective call.

    Args:
        owns: the directory is this run's to tidy; else nothing in it is touched, another run may be going on there.

    Raises:
        ConfigError: `resume: never` in a directory that holds checkpoints.
        CheckpointError: every checkpoint in the directory, or the one to load, is damaged; or there is none to load.
    """
    root = Path(config.directory)
    found = _from_rank_zero(partial(checkpoints, root), root, world)
    if config.resume == "never" and found:
        raise ConfigError(
            f"checkpoint.directory: found {root}, which holds checkpoints ({found[0].name}); needs a new directory, or "
            "checkpoint.resume: auto to go on from the newest"
        )
    return _resume(root, world, owns) or start_from(config, world)


def start_from(config: CheckpointConfig, world: ProcessGroup) -> Start | None:
    """The checkpoint that `checkpoint.load` names, None where it names none; collective. Raises CheckpointError."""
    if config.load is None:
        return None
    directory = find_checkpoint(config.load)
    manifest = Manifest.read(directory)
    if (damage := find_damage(directory, manifest, world)) is not None:
        raise CheckpointError(f"checkpoint.load: {directory} is damaged: {damage}")
    return Start(directory, manifest, config.load_states)


def _resume(root: Path, world: ProcessGroup, owns: bool) -> Start | None:
    """The newest good checkpoint of the run's own directory; its owner sets aside those found damaged on the way."""
    if owns:
        _from_rank_zero(partial(tidy, root), root, world)
    damaged: dict[Path, str] = {}
    for directory in _from_rank_zero(partial(checkpoints, root), root, world):
        manifest, damage = _from_rank_zero(partial(_read_manifest, directory), root, world)
        if manifest is not None:
            damage = find_damage(directory, manifest, world)
        if manifest is not None and damage is None:
            if owns:
                _from_rank_zero(partial(_pass_over, list(damaged), directory), root, world)
            if damaged and world.rank() == 0:
                aside = ", what is damaged is set aside" if owns else ""
                logger.warning("%s; going on from %s instead%s", _told(damaged), directory, aside)
            return Start(directory, manifest, "all")
        damaged[directory] = f"checkpoint {directory} is damaged: {damage}"
    if damaged:
        raise CheckpointError(
            f"no good checkpoint in {root}: {_told(damaged)}; restore one of them, or move them "
            "elsewhere to start from the beginning"
        )
    return None


def _read_manifest(directory: Path) -> tuple[Manifest | None, str | None]:
    try:
        return Manifest.read(directory), None
    except OtherFormatError:
        raise
    except CheckpointError as error:
        return None, str(error)


def _pass_over(damaged: list[Path], good: Path) -> None:
    for directory in damaged:
        set_aside(directory)
    point_to(good)  # also where a kill came before the pointer was moved


def _told(damaged: dict[Path, str]) -> str:
    return "; ".join(damaged.values())


def _from_rank_zero(action: Callable[[], T], root: Path, world: ProcessGroup) -> T:
    return on_rank_zero(action, world, f"checkpoint.directory {root} cannot be used")
