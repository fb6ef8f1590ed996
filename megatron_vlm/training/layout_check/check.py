"""`--check-layout`: does this recipe's layout compute what one process does, and if not, where does it begin to differ?

The master test as a debugging tool (DESIGN 5). Every rank runs a few steps of the user's recipe, shrunk
(`shrink.py`), through the real job, loader and step, and records what it computes. Rank 0 runs the same steps in a
child of one process, collects the records, and compares them in the order of computation: the first tensor that differs
is the one to look at. Ranks that wait for each other for ever are noticed and told apart too.

Nothing is written but in temporary folders: the user's checkpoints and logs are not touched.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ParallelError
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.runtime.collectives import broadcast_object
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.progress import Progress
from megatron_vlm.training.job import build_job
from megatron_vlm.training.layout_check.compare import compare, first_difference
from megatron_vlm.training.layout_check.difference import Comparison, Difference
from megatron_vlm.training.layout_check.hang import Hang, run_watched
from megatron_vlm.training.layout_check.hints import hint_of
from megatron_vlm.training.layout_check.record import Record, gather_records, observe
from megatron_vlm.training.layout_check.reference import ReferenceProcess, exact_arithmetic
from megatron_vlm.training.layout_check.shrink import shrink
from megatron_vlm.training.preflight import settle_run

MAX_HANG_SECONDS = 60.0  # without a step made
REFERENCE_SECONDS = 1200.0
MAX_RANKS_NAMED = 8
POLL_SECONDS = 0.1

logger = get_logger(__name__)


class Reference(Protocol):
    """Something that comes up with the record of one process."""

    def record(self, limit_seconds: float) -> Record: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class LayoutReport:
    """Result of the check.

    Args:
        sizes: of the layout.
        comparisons: in the order of computation; none after a hang.
        hang: where the ranks waited for each other.
    """

    sizes: GridSizes
    comparisons: Sequence[Comparison] = ()
    hang: Hang | None = None

    @property
    def first(self) -> Difference | None:
        """The first tensor that differs."""
        return first_difference(self.comparisons)

    @property
    def passed(self) -> bool:
        """Whether the layout computes what one process does."""
        return self.first is None and self.hang is None

    def table(self) -> str:
        """A line per kind of tensor."""
        lines = [f"{'compared':<32}{'number':>8}{'largest difference':>22}   verdict"]
        for comparison in self.comparisons:
            verdict = "equal" if comparison.first is None else "DIFFERS"
            number, worst = len(comparison.differences), f"{comparison.worst:.1e}"
            lines.append(f"{comparison.title:<32}{number:>8}{worst:>22}   {verdict}")
        return "\n".join(lines)

    def raise_on_fault(self) -> None:
        """Raises ParallelError: the first tensor that differs, or the hang, on one line."""
        if self.hang is not None:
            ranks = self._ranks([place.rank for place in self.hang.places])
            raise ParallelError(f"the layout hangs: {self.hang}; {ranks}")
        if self.first is not None:
            ranks = f", on {self._ranks(self.first.ranks)}" if self.first.ranks else ""
            hint = hint_of(self.first, self.comparisons)
            raise ParallelError(
                f"the layout differs from one process, first in {self.first.phase}: {self.first}{ranks}; {hint}"
            )

    def _ranks(self, ranks: Sequence[int]) -> str:
        """`rank 3 (tensor 1 pipeline 1), ...`, by the axes that have several ranks."""
        axes = [axis for axis in ("tensor", "ulysses", "ring", "data", "pipeline") if getattr(self.sizes, axis) > 1]

        def name(rank: int) -> str:
            at = self.sizes.coordinates(rank)
            return f"rank {rank} ({' '.join(f'{axis} {getattr(at, axis)}' for axis in axes)})"

        return ", ".join(map(name, ranks[:MAX_RANKS_NAMED])) + (", ..." if len(ranks) > MAX_RANKS_NAMED else "")


def check_layout(
    config: Config, launch: Launch, reference: Callable[[Config, Path], Reference] = ReferenceProcess
) -> LayoutReport:
    """Checks the layout of a recipe. Every rank of the default process group calls it, once.

    Args:
        config: the user's recipe.
        launch: this rank's place.
        reference: starts the one process to compare with, given the small recipe and a folder.

    Raises:
        MegatronVlmError: everything wrong with recipe, tokenizer, template and the data's beginning, in one error; or
            the one process failed.
    """
    world, store = dist.group.WORLD, _own_store()
    assert world is not None, "there is no default process group"
    ranks_per_node = broadcast_object(launch.local_world_size, world)
    settled = settle_run(config, launch.world_size, ranks_per_node, resumes=False, opens_data=True)
    config = settled.config
    sizes = GridSizes.from_config(config.parallel, launch.world_size)
    shrunk = shrink(config, launch.world_size, settled.model) if launch.rank == 0 else None
    small, samples = broadcast_object(shrunk, world)
    with tempfile.TemporaryDirectory(prefix="check-layout-") as folder:
        small = place_in(small, samples, Path(folder))
        one = reference(small, Path(folder)) if launch.rank == 0 else None
        try:
            limit_seconds = min(MAX_HANG_SECONDS, config.runtime.timeout_seconds)
            logger.info(
                "checking the layout: %d steps of %d rows of up to %d tokens; %.0f s without a step made are a hang",
                small.training.num_steps, small.training.global_batch_size, small.training.sequence_length,
                limit_seconds,
            )  # fmt: skip
            found = _run_layout(small, launch, store, limit_seconds)
            if isinstance(found, Hang):
                return LayoutReport(sizes, hang=found)
            records = gather_records(found, world)
            comparisons: list[Comparison] | None = None
            if one is not None and records is not None:
                comparisons = compare(one.record(REFERENCE_SECONDS), records, small)
            return LayoutReport(sizes, _share(comparisons, store, launch))
        finally:
            if one is not None:
                one.close()


def _own_store() -> Store:
    """A connection to the job's store for this check alone: the process group's may be waiting."""
    return dist.PrefixStore("check-layout", _get_default_store().clone())  # type: ignore[attr-defined]


def place_in(small: Config, samples: list[dict], folder: Path) -> Config:
    """Writes the samples' file and gives the recipe its paths."""
    path = folder / "samples.json"
    path.write_text(json.dumps(samples))
    data = small.data.model_copy(update={"path": str(path)})
    checkpoint = small.checkpoint.model_copy(update={"directory": str(folder / "checkpoints")})
    return small.model_copy(update={"data": data, "checkpoint": checkpoint})


def _run_layout(small: Config, launch: Launch, store: Store, limit_seconds: float) -> Record | Hang:
    """The layout's steps, watched."""
    exact_arithmetic()

    def work(give_sign: Callable[[int], None]) -> Record:
        job = build_job(small, launch.world_size)
        give_sign(0)
        with Progress("checking the layout", total=small.training.num_steps) as progress:

            def after_step(steps: int) -> None:
                give_sign(steps)
                progress.update(steps)

            return observe(job, small.training.num_steps, after_step)

    return run_watched(work, store, launch.rank, launch.world_size, limit_seconds)


def _share(comparisons: list[Comparison] | None, store: Store, launch: Launch) -> list[Comparison]:
    """Rank 0's comparisons, on every rank. The one process may take long, longer than a collective may."""
    if launch.rank == 0:
        store.set("compared", "1")
    while not store.check(["compared"]):
        time.sleep(POLL_SECONDS)
    assert dist.group.WORLD is not None
    return broadcast_object(comparisons, dist.group.WORLD)
