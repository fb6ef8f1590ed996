"""Saving and loading of whole training states, in a form any layout reads.

A checkpoint is written beside its place and renamed into it, and the file `latest` is replaced last: whatever is
killed, whatever `latest` names is whole. Tensors are stored with megatron-core's dist_checkpointing as parts of global
tensors, the optimizer's in the fully reshardable format, so tensor, pipeline and data parallel sizes may differ between
saving and loading.

Hazards: megatron-core stacks equal layers into one tensor by default, and an optimizer that trains some of them can
then not be saved; here every layer has keys of its own. It also loads what it finds and passes over the rest in
silence; here a tensor too many is an error, as one too few. torch's CheckpointException is no Exception: it must be
caught by name, or a failed save would end a rank without a word.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_vlm.config.loading import config_hash
from megatron_vlm.config.schema import CheckpointConfig, Config
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.runtime.failure import kind_of

LATEST = "latest"
_PER_LAYER_KEYS = {"non_homogeneous_layers": True}
_NUM_SHOWN = 3  # tensors per error
_OTHER_STATES = (
    "; where other parameters train than in the checkpoint, or optimizer.distributed differs, set "
    "checkpoint.load_states to model to start a new phase from its weights"
)
_WRITE_ERRORS = (CheckpointingException, CheckpointException, OSError, RuntimeError)
_READ_ERRORS = (*_WRITE_ERRORS, EOFError, KeyError, UnpicklingError, ValueError)


def resolve_checkpoint(config: CheckpointConfig) -> Path | None:
    """The checkpoint `checkpoint.load` names, None where it names none. Raises CheckpointError where there is none."""
    return None if config.load is None else find_checkpoint(config.load)


def refuse_to_overwrite(config: CheckpointConfig) -> None:
    """Raises ConfigError where `checkpoint.directory` holds checkpoints that this run does not go on from."""
    root, start_from = Path(config.directory), resolve_checkpoint(config)
    inside = start_from is not None and start_from.resolve().parent == root.resolve()
    if (root / LATEST).is_file() and not (inside and config.load_states == "all"):
        raise ConfigError(
            f"checkpoint.directory: found {root}, which holds another run's checkpoints; needs a new directory, or "
            f"checkpoint.load={root} to go on from them"
        )


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """A checkpoint directory: `path` itself, or the one `path/latest` names. Raises CheckpointError."""
    directory = Path(path)
    pointer = directory / LATEST
    if pointer.is_file():
        directory = directory / pointer.read_text(encoding="utf-8").strip()
        if not directory.exists() and _replaced(directory).exists():
            directory = _replaced(directory)  # killed while it was being replaced
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
    try:
        dist_checkpointing.save({"model": weights, "optimizer": optimizer}, str(partial))
    except _WRITE_ERRORS as error:
        raise _as_checkpoint_error(f"{partial} could not be written", error) from error
    manifest = Manifest(
        step=state.step,
        config=state.config.model_dump(mode="json"),
        config_hash=config_hash(state.config),
        components=components(state.optimizer),
        vocab_size=state.model.language[0].spec.vocab_size,
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
    vocab_size = model.language[0].spec.vocab_size
    if manifest.vocab_size != vocab_size:  # the table's padding depends on the layout, so its shape is not compared
        raise CheckpointError(f"{directory} has a vocabulary of {manifest.vocab_size}, this model one of {vocab_size}")
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
    state = {
        f"language{i}": chunk.sharded_state_dict(prefix="language.", metadata=dict(_PER_LAYER_KEYS))
        for i, chunk in enumerate(model.language)
    }
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


def _replaced(final: Path) -> Path:
    """Where a checkpoint of the same step stands until its successor is in place."""
    return final.with_name(f".replaced_{final.name}")


def _publish(partial: Path, final: Path, pointer: Path) -> None:
    replaced = _replaced(final)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)  # a kill came between the renaming and the removal
        os.rename(final, replaced)
    os.rename(partial, final)
    if replaced.exists():
        shutil.rmtree(replaced)
    temporary = pointer.with_name(f".{pointer.name}.partial")
    temporary.write_text(final.name, encoding="utf-8")
    os.replace(temporary, pointer)


def _read(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fills `state`; raises CheckpointError where checkpoint and `state` do not hold the same tensors."""
    problem = f"{directory} cannot be loaded into this model"
    try:
        loaded, only_saved, only_wanted = dist_checkpointing.load(state, directory, strict=StrictHandling.RETURN_ALL)
    except _READ_ERRORS as error:
        raise _as_checkpoint_error(problem, error, _OTHER_STATES if "optimizer" in state else "") from error
    if "optimizer" not in state:
        only_saved = {name for name in only_saved if not name.startswith("optimizer.")}
    complaints = [
        f"{len(names)} tensors only in {where}: {', '.join(sorted(names)[:_NUM_SHOWN])}"
        for where, names in (("the checkpoint", only_saved), ("the model", only_wanted))
        if names
    ]
    if complaints:
        raise CheckpointError(f"{problem}: {'; '.join(complaints)}{_OTHER_STATES if 'optimizer' in state else ''}")
    return loaded


def _as_checkpoint_error(problem: str, error: BaseException, hint: str = "") -> BaseException:
    """`error` in one line as a CheckpointError; itself where it only says that another rank is gone."""
    if kind_of(error) == "echo":
        return error
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):  # of all ranks; only the coordinator is told which
        causes = [cause for cause, _ in error.failures.values()] or [RuntimeError("another rank failed")]
    reason = str(causes[0]) or repr(causes[0])
    return CheckpointError(f"{problem}: {reason.splitlines()[0]}{hint}")


def _without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items()}
