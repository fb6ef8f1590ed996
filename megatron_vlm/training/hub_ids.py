"""A recipe's hub ids as commits: looked up once per run, by one rank, and kept with every checkpoint.

`org/name@main` becomes `org/name@<commit>` in the recipe as it runs, which is what recipe.yaml and the manifests hold.
A run that goes on takes the commits of its checkpoints, whatever its branches have become.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.checkpoint.directory import checkpoints, find_checkpoint
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.model_sources import read_sources
from megatron_vlm.config.schema import CheckpointConfig, Config
from megatron_vlm.errors import CheckpointError, ConfigError, MegatronVlmError, one_line
from megatron_vlm.models import hub
from megatron_vlm.runtime.collectives import broadcast_object
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)


def pin_hub_ids(config: Config, resumes: bool, world: dist.ProcessGroup) -> tuple[Config, dict[str, str]]:
    """The recipe with commits in its hub ids, and hub id as it was named -> commit; a collective call.

    Args:
        resumes: the run may go on in `checkpoint.directory`.

    Raises:
        ConfigError: on every rank, for an id whose commit cannot be found.
        CheckpointError: on every rank, for a checkpoint to load that is none.
    """
    outcome: tuple[dict[str, str], MegatronVlmError | None] | None = None
    if world.rank() == 0:
        try:
            kept = _kept_commits(config.checkpoint, resumes)
            outcome = {path: _commit(key, path, kept) for key, path in _hub_ids(config)}, None
        except MegatronVlmError as error:
            outcome = {}, error
    commits, fault = broadcast_object(outcome, world)
    if fault is not None:
        raise fault
    return with_commits(config, commits), commits


def with_commits(config: Config, commits: Mapping[str, str]) -> Config:
    """The recipe with these commits in the place of branches and tags."""

    def pinned(path: str | None) -> str | None:
        return path if path is None or path not in commits else f"{path.partition('@')[0]}@{commits[path]}"

    language, vision = config.model.language, config.model.vision
    paths = {"path": pinned(language.path), "tokenizer": pinned(language.tokenizer)}
    parts = {
        "language": language.model_copy(update=paths),
        "vision": vision.model_copy(update={"path": pinned(vision.path)}),
    }
    return config.model_copy(update={"model": config.model.model_copy(update=parts)})


def _hub_ids(config: Config) -> Iterator[tuple[str, str]]:
    """(key, id) of those in a recipe."""
    language, vision = config.model.language, config.model.vision
    paths = {"language.path": language.path, "language.tokenizer": language.tokenizer, "vision.path": vision.path}
    for key, path in paths.items():
        if path is not None and hub.parse(path) is not None:
            yield f"model.{key}", path


def candidates(config: CheckpointConfig, resumes: bool) -> list[Path]:
    """The checkpoints one of which a run goes on from, the likeliest first; none where it begins. Raises
    CheckpointError."""
    found: list[Path] = checkpoints(Path(config.directory)) if resumes else []
    if not found and config.load is not None and config.load_states == "all":
        found = [find_checkpoint(config.load)]
    return found


def _kept_commits(config: CheckpointConfig, resumes: bool) -> dict[str, str]:
    """Those of the checkpoint the run is to go on from: which one that is is found later, and all have the same."""
    for checkpoint in candidates(config, resumes):
        try:
            return read_sources(checkpoint, Manifest.read(checkpoint).files)
        except CheckpointError:  # damaged: what is damaged is told where the checkpoints are compared
            continue
    return {}


def _commit(key: str, path: str, kept: Mapping[str, str]) -> str:
    """Raises ConfigError."""
    try:
        now = hub.pinned(path).partition("@")[2]
    except hub.HubError as error:
        if path not in kept:
            raise ConfigError(f"{key}: the commit of {path!r} cannot be found: {one_line(error)}") from error
        now = kept[path]
    commit = kept.get(path, now)
    if commit == path.partition("@")[2]:
        return commit
    if commit == now:
        logger.info("%s: %s is commit %s", key, path, commit)
    else:
        logger.warning(
            "%s: %s is commit %s now; the run continues with the commit it began with, %s", key, path, now, commit
        )
    return commit
