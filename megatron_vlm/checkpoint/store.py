"""Saving and loading of whole training states, in a form any layout reads.

A checkpoint is written beside its place and renamed into it, and the file `latest` is replaced last: whatever is
killed, whatever `latest` names is whole. Tensors are stored with megatron-core's dist_checkpointing as parts of global
tensors, the optimizer's in the fully reshardable format, so tensor, pipeline and data parallel sizes may differ between
saving and loading.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_vlm.config.loading import config_hash
from megatron_vlm.config.schema import CheckpointConfig, Config
from megatron_vlm.errors import CheckpointError
from megatron_vlm.models.vlm import VisionLanguageModel

LATEST = "latest"


def resolve_checkpoint(config: CheckpointConfig) -> Path | None:
    """The checkpoint `checkpoint.load` names, None where it names none. Raises CheckpointError where there is none."""
    return None if config.load is None else find_checkpoint(config.load)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """A checkpoint directory: `path` itself, or the one `path/latest` names. Raises CheckpointError."""
    directory = Path(path)
    pointer = directory / LATEST
    if pointer.is_file():
        directory = directory / pointer.read_text(encoding="utf-8").strip()
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: {directory} is not a directory")
    Manifest.read(directory)
    return directory


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint keeps.

    Args:
        config: the recipe, stored in the manifest.
        step: updates made.
        model: whose weights.
        optimizer: whose states.
        language: the chunks' wrappers: their parameters are gathered first where the gather overlaps the next forward.
        write_sources: writes tokenizer and Hugging Face configs into a directory, on rank 0.
    """

    config: Config
    step: int
    model: VisionLanguageModel
    optimizer: ChainedOptimizer
    language: list[DistributedDataParallel]
    write_sources: Callable[[Path], None]


def save_checkpoint(state: TrainingState) -> Path:
    """Saves; a collective call. Returns the published directory, `<checkpoint.directory>/step_NNNNNNN`.

    Raises:
        CheckpointError: on every rank, where the files cannot be written; nothing published before is touched.
    """
    for chunk in state.language:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    root = Path(state.config.checkpoint.directory)
    final, partial = root / f"step_{state.step:07d}", root / f".partial_step_{state.step:07d}"
    on_rank_zero(lambda: _fresh_directory(partial))
    weights = model_state(state.model)
    optimizer = sharded_optimizer_state(state.optimizer, weights)
    dist_checkpointing.save({"model": weights, "optimizer": optimizer}, str(partial))
    manifest = Manifest(
        step=state.step,
        config=state.config.model_dump(mode="json"),
        config_hash=config_hash(state.config),
        components=components(state.optimizer),
    )

    def publish() -> None:
        state.write_sources(partial)
        manifest.write(partial)
        _publish(partial, final, root / LATEST)

    on_rank_zero(publish)
    return final


def load_checkpoint(
    directory: Path, model: VisionLanguageModel, optimizer: ChainedOptimizer | None, states: str
) -> int:
    """Fills the model and, for `states` "all", the optimizer; a collective call.

    Returns:
        The number of updates to go on from: the checkpoint's with "all", 0 with "model".

    Raises:
        CheckpointError: unreadable, or of a model with other parameters.
    """
    manifest = Manifest.read(directory)
    weights = model_state(model)
    state: dict[str, Any] = {"model": weights}
    if states == "all":
        assert optimizer is not None
        if manifest.components != components(optimizer):
            raise CheckpointError(
                f"{directory} has optimizer states of {manifest.components}, this recipe trains {components(optimizer)}"
                "; set checkpoint.load_states to model to start a new phase from its weights"
            )
        state["optimizer"] = sharded_optimizer_state(optimizer, weights, is_loading=True)
    loaded = _read(state, directory)
    load_model_state(model, loaded["model"])
    if states != "all":
        if optimizer is not None:
            optimizer.reload_model_params()
        return 0
    assert optimizer is not None
    optimizer.load_state_dict(loaded["optimizer"])
    return manifest.step


def model_state(model: VisionLanguageModel) -> dict[str, Any]:
    """The sharded state of every chunk on this rank; keys inside are global, so chunks of one rank do not collide."""
    state = {f"language{i}": chunk.sharded_state_dict(prefix="language.") for i, chunk in enumerate(model.language)}
    state["vision"] = model.vision.sharded_state_dict(prefix="")
    return state


def load_model_state(model: VisionLanguageModel, state: dict[str, Any]) -> None:
    """Copies a loaded state into the chunks."""
    for i, chunk in enumerate(model.language):
        chunk.load_state_dict(_without_prefix(state[f"language{i}"], "language."))
    model.vision.load_state_dict(state["vision"])


def components(optimizer: ChainedOptimizer) -> list[str]:
    """Which of language and vision (tower and projector) have optimizer states, in the chain's order."""
    groups = [part.param_groups[0]["component"] for part in optimizer.chained_optimizers]
    return ["language" if component == "language" else "vision" for component in groups]


def on_rank_zero(action: Callable[[], None]) -> None:
    """Runs `action` on rank 0 while the others wait; its OSError is raised on every rank as a CheckpointError."""
    failed: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failed = [str(error)]
    torch.distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise CheckpointError(f"the checkpoint could not be written: {failed[0]}")


def _fresh_directory(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)  # what a killed save left behind
    directory.mkdir(parents=True)


def _publish(partial: Path, final: Path, pointer: Path) -> None:
    replaced = final.with_name(f".replaced_{final.name}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    if replaced.exists():
        shutil.rmtree(replaced)
    temporary = pointer.with_name(f".{pointer.name}.partial")
    temporary.write_text(final.name, encoding="utf-8")
    os.replace(temporary, pointer)


def _read(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(directory))
    except (CheckpointingException, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{directory} cannot be loaded into this model: {str(error).splitlines()[0]}") from error


def _without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items()}
