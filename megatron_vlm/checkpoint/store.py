"""The states of a run that a checkpoint holds, and their way back into a run of any layout.

Tensors are stored with megatron-core's dist_checkpointing as parts of global tensors, so tensor, pipeline and data
parallel sizes may differ between saving and loading. Random states belong to ranks: they come back where the layout is
the same, and are drawn anew from seed and step where it is not.

Hazards: megatron-core stacks equal layers into one tensor by default, and an optimizer that trains some of them can
then not be saved; here every layer has keys of its own. It also loads what it finds and passes over the rest in
silence; here a tensor too many is an error, as one too few. torch's CheckpointException is no Exception: it must be
caught by name, or a failed load would end a rank without a word.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.checkpoint.integrity import find_damage
from megatron_vlm.checkpoint.manifest import FileRecord, Manifest
from megatron_vlm.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_vlm.checkpoint.reading import load_sharded
from megatron_vlm.checkpoint.stored_metadata import read_metadata
from megatron_vlm.config.loading import config_hash
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import CheckpointError, one_line
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.runtime.failure import kind_of
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.seeding import are_of_this_device, random_states, restore_random_states, seed_everything

_PER_LAYER_KEYS = {"non_homogeneous_layers": True}
_RANDOM_KEY = "random_states"
_NUM_SHOWN = 3  # tensors per error
_OTHER_STATES = (
    "; where other parameters train than in the checkpoint, or optimizer.distributed differs, set "
    "checkpoint.load_states to model to start a new phase from its weights"
)
_READ_ERRORS = (
    CheckpointingException,
    CheckpointException,
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    UnpicklingError,
    ValueError,
)

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """The states that a checkpoint keeps.

    Args:
        config: the recipe, stored in the manifest.
        step: updates made.
        grid: the layout.
        model: whose weights.
        optimizer: whose states.
        language: the chunks' wrappers: their parameters are gathered first where the gather overlaps the next forward.
        data_fingerprint: of the training samples, None where none are open.
        write_sources: writes tokenizer and Hugging Face configs into a directory, on rank 0.
    """

    config: Config
    step: int
    grid: Grid
    model: VisionLanguageModel
    optimizer: ChainedOptimizer
    language: list[DistributedDataParallel]
    data_fingerprint: dict[str, int | str] | None
    write_sources: Callable[[Path], None]

    def sharded(self) -> dict[str, Any]:
        """This rank's part, its tensors those of the run itself. Collective where parameters are to be gathered."""
        for chunk in self.language:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        weights = model_state(self.model)
        return {
            "model": weights,
            "optimizer": sharded_optimizer_state(self.optimizer, weights),
            "random": _random_place(self.grid, random_states()),
        }

    def manifest(self, files: dict[str, FileRecord]) -> Manifest:
        """The manifest of a checkpoint with these files."""
        return Manifest(
            step=self.step,
            config=self.config.model_dump(mode="json"),
            config_hash=config_hash(self.config),
            components=components(self.optimizer),
            vocab_size=self.model.language[0].spec.vocab_size,
            layout=layout_of(self.model),
            data_fingerprint=self.data_fingerprint,
            files=files,
        )


def load_checkpoint(
    directory: Path,
    model: VisionLanguageModel,
    optimizer: ChainedOptimizer | None,
    states: str,
    is_verified: bool = False,
) -> int:
    """Fills the model and, for `states` "all", the optimizer and the random states; a collective call.

    Args:
        is_verified: the files have been compared with the manifest already.

    Returns:
        The number of updates to go on from: the checkpoint's with "all", 0 with "model".

    Raises:
        CheckpointError: damaged, unreadable, or of a model with other parameters.
    """
    manifest = Manifest.read(directory)
    if not is_verified and (damage := find_damage(directory, manifest, model.grid.world)) is not None:
        raise CheckpointError(f"{directory} is damaged: {damage}")
    vocab_size = model.language[0].spec.vocab_size
    if manifest.vocab_size != vocab_size:  # the table's padding depends on the layout, so its shape is not compared
        raise CheckpointError(f"{directory} has a vocabulary of {manifest.vocab_size}, this model one of {vocab_size}")
    weights = model_state(model)
    state: dict[str, Any] = {"model": weights}
    is_same_layout = manifest.layout == layout_of(model)
    if states == "all":
        assert optimizer is not None
        if manifest.components != components(optimizer):
            raise CheckpointError(
                f"{directory} has optimizer states of {manifest.components}, this recipe trains {components(optimizer)}"
                "; set checkpoint.load_states to model to start a new phase from its weights"
            )
        state["optimizer"] = sharded_optimizer_state(optimizer, weights, is_loading=True)
        if is_same_layout:
            state["random"] = _random_place(model.grid, None)
    loaded = _read(state, directory, manifest)
    with _told_as_misfit(directory):
        load_model_state(model, loaded["model"])
    if states != "all":
        if optimizer is not None:
            optimizer.reload_model_params()
        return 0
    assert optimizer is not None
    with _told_as_misfit(directory):
        load_optimizer_state(optimizer, loaded["optimizer"])
        is_same_device = is_same_layout and are_of_this_device(loaded["random"])
        if is_same_device:
            restore_random_states(loaded["random"])
    if not is_same_device:
        other = "kind of device" if is_same_layout else "layout"
        logger.info("another %s than the checkpoint's: random numbers start afresh from seed and step", other)
        seed_everything(manifest.config["runtime"]["seed"], model.grid, manifest.step)
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
    """Names of language and vision (tower and projector) that have optimizer states, in the chain's order."""
    groups = [part.param_groups[0]["component"] for part in optimizer.chained_optimizers]
    return ["language" if component == "language" else "vision" for component in groups]


def layout_of(model: VisionLanguageModel) -> dict[str, int]:
    """Ranks per axis, and model chunks per pipeline rank."""
    return {**asdict(model.grid.sizes), "virtual_pipeline": len(model.language)}


def _random_place(grid: Grid, states: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject(_RANDOM_KEY, states, (grid.sizes.world,), (grid.rank,))


@contextmanager
def _told_as_misfit(directory: Path) -> Iterator[None]:
    """Turns objects that are not what a run keeps into one CheckpointError: what was read is data of any kind."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded into this model: {one_line(error, first=True)}") from error


def _read(state: dict[str, Any], directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Fills `state`; raises CheckpointError where checkpoint and `state` do not hold the same tensors."""
    problem = f"{directory} cannot be loaded into this model"
    try:
        metadata = read_metadata(directory, manifest.files)
        loaded, only_saved, only_wanted = load_sharded(state, directory, metadata)
    except _READ_ERRORS as error:
        raise _as_checkpoint_error(problem, error, _OTHER_STATES if "optimizer" in state else "") from error
    kinds = {"optimizer": "optimizer.", "random": _RANDOM_KEY}
    not_wanted = tuple(prefix for kind, prefix in kinds.items() if kind not in state)
    only_saved = {name for name in only_saved if not name.startswith(not_wanted)}
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
    if kind_of(error) == "echo" or isinstance(error, CheckpointError):
        return error
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):  # of all ranks; only the coordinator is told which
        causes = [cause for cause, _ in error.failures.values()] or [RuntimeError("another rank failed")]
        if told := [cause for cause in causes if isinstance(cause, CheckpointError)]:
            return told[0]
    return CheckpointError(f"{problem}: {one_line(causes[0], first=True)}{hint}")


def _without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items()}
