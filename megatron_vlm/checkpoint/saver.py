"""Saves checkpoints while training goes on, and makes them visible when every rank has written its part.

    start    the ranks agree on who writes what, and each copies its part for a process that writes it, into a hidden
             directory
    poll     after every step: once all parts are there, rank 0 adds the manifest, renames the directory into its place,
             replaces `latest` and has what is older than the recipe keeps removed, while training goes on

So whatever is killed, and whenever, what `latest` names is whole. At most one save is in flight; the next one waits.
A part that cannot be written (disk full, writer killed) is one CheckpointError on every rank, with the cause of the
rank that had it, and nothing published before is touched.
"""

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemWriter

from megatron_vlm.checkpoint.directory import (
    checkpoint_path,
    create_partial,
    on_rank_zero,
    partial_path,
    publish,
    retire_all_but,
)
from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import BACKENDS_FILE, COMMON_FILE, METADATA_FILE
from megatron_vlm.checkpoint.planning import Planner
from megatron_vlm.checkpoint.reading import BACKENDS
from megatron_vlm.checkpoint.store import TrainingState
from megatron_vlm.checkpoint.writing import BackgroundWriter, Outcome, Part, SharedMemory, reason_of, start_server
from megatron_vlm.config.schema import CheckpointConfig
from megatron_vlm.errors import CheckpointError
from megatron_vlm.runtime.collectives import all_gather_objects, all_reduce_max, gather_objects
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)
REMOVAL_SECONDS = 10.0  # that the end of a run waits for it: the next start removes the rest
_TORCH_DIST = CheckpointingConfig(BACKENDS[0], 1, BACKENDS[1], 1)  # how dist_checkpointing.load reads it


@dataclass(frozen=True)
class _Save:
    """A save in flight."""

    state: TrainingState
    writer: BackgroundWriter
    final: Path


class CheckpointSaver:
    """Saves into `checkpoint.directory`. Every rank calls the same methods in the same order.

    Args:
        config: of the recipe whose states are saved; the directory is taken from here.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._planner = Planner()
        self._save: _Save | None = None
        self._memory: SharedMemory | None = None
        self._published: list[Path] = []
        self._removal: threading.Thread | None = None  # of old checkpoints, on rank 0
        if config.async_save:
            start_server()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part is still being written."""
        return self._save is not None and self._save.writer.is_writing

    def start(self, state: TrainingState) -> None:
        """Begins to save; with `async_save` off, saves. The state may change as soon as this returns.

        Raises:
            CheckpointError: on every rank, where this or the save before it cannot be written.
        """
        if self._save is not None:
            if all_reduce_max([self.is_writing], state.grid.world)[0]:
                logger.info("%s is still being written: step %d waits for it", self._save.final, state.step)
            self._complete(self._save)
        final, world = checkpoint_path(Path(self.config.directory), state.step), state.grid.world
        items, common = self._planner.items(state.sharded(), world)

        def prepare() -> None:
            self._wait_for_removal()  # the disk may have no room for one more
            partial = create_partial(final)
            try:
                with open(partial / COMMON_FILE, "wb") as file:  # torch's own file would not say why it failed
                    torch.save(common, file)
                state.write_sources(partial)
            except Exception as error:  # the tokenizers library tells a full disk by an error of its own
                shutil.rmtree(partial, ignore_errors=True)
                raise OSError(reason_of(error)) from error

        on_rank_zero(prepare, world, _problem(final))
        part = Part(partial_path(final), world.rank(), items)
        if self.config.async_save:
            writer = BackgroundWriter(part, self._memory)
            self._save, self._memory = _Save(state, writer, final), writer.memory
        else:
            self._publish(state, part.write(), final)

    def poll(self, is_writing: bool | None = None) -> list[Path]:
        """The checkpoints published since the last call; a collective call, to be made after every step.

        Args:
            is_writing: `is_writing` of any rank, where the caller has asked all of them together already.

        Raises:
            CheckpointError: on every rank, where the checkpoint in flight cannot be written.
        """
        if self._save is not None:
            if is_writing is None:
                is_writing = bool(all_reduce_max([self.is_writing], self._save.state.grid.world)[0])
            if not is_writing:
                self._complete(self._save)
        published, self._published = self._published, []
        return published

    def finish(self) -> list[Path]:
        """Same as `poll`, but waits for what is in flight."""
        return self.poll(is_writing=False)

    def close(self) -> None:
        """Drops what is in flight; its directory is removed by the next start. Not collective, safe to call twice."""
        if self._save is not None:
            self._save.writer.end()
            self._save = None
        self._wait_for_removal(REMOVAL_SECONDS)
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _complete(self, save: _Save) -> None:
        outcome = save.writer.outcome()
        self._save = None
        self._publish(save.state, outcome, save.final)

    def _publish(self, state: TrainingState, outcome: Outcome, final: Path) -> None:
        world, partial = state.grid.world, partial_path(final)
        errors = all_gather_objects(outcome.error, world)
        for rank, error in enumerate(errors):
            if error is not None:
                if world.rank() == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(f"{_problem(final)}: {error} (rank {rank})")
        outcomes = gather_objects(outcome, world)

        def finalize() -> None:
            assert outcomes is not None and self._planner.metadata is not None
            try:
                FileSystemWriter(partial).finish(self._planner.metadata, [part.results for part in outcomes])
                save_config(_TORCH_DIST, str(partial))
                files = records_of(partial, [partial / METADATA_FILE, partial / BACKENDS_FILE])
                listed = {name: record for part in outcomes for name, record in part.files.items()} | files
                state.manifest(listed).write(partial)
                publish(partial, final)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                raise

        on_rank_zero(finalize, world, _problem(final))
        self._published.append(final)
        if (keep := self.config.keep) is not None:
            problem = f"checkpoint.keep: older checkpoints in {final.parent} could not be removed"
            retired = on_rank_zero(lambda: retire_all_but(final.parent, keep), world, problem)
            if retired and world.rank() == 0:
                self._wait_for_removal()
                self._removal = threading.Thread(target=_remove, args=[retired], name="removal", daemon=True)
                self._removal.start()

    def _wait_for_removal(self, seconds: float | None = None) -> None:
        if self._removal is not None:
            self._removal.join(seconds)
            self._removal = None


def _remove(retired: list[Path]) -> None:
    for directory in retired:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning("%s could not be removed: %s; the next start tries again", directory, error)


def _problem(final: Path) -> str:
    return f"checkpoint {final} could not be written"
