"""What saving costs a run that goes on: time of a step while a checkpoint is being written, and memory of the host.

One rank, and a second core for its writer. Steps with and without a save in flight alternate, so that what else the
machine does falls on both; medians are compared, of the clock and of the rank's own CPU time, which pages that are
copied because the writer still has them count into, but neighbours do not. Where the machine is busy, the clock is
printed and not judged.
"""

import contextlib
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from megatron_vlm.checkpoint import saver as saver_module
from megatron_vlm.checkpoint.saver import CheckpointSaver
from megatron_vlm.config.schema import Config
from megatron_vlm.training import schedule
from megatron_vlm.training.job import Job, build_job
from tests.helpers.faults.parts import GatedPart, gate_of
from tests.helpers.models.tiny import tiny_llama, tiny_recipe
from tests.helpers.ranks.pool import RankPool

NUM_WARM_UP = 24  # steps: by then the heap has its size (bf16: after 18)
NUM_PAIRS = 9
TIME_LIMIT = 1.15  # of a step without a save
WRITER_BYTES = 48 * 2**20  # a small process: what it has besides one copy of what is saved


@dataclass
class Cost:
    """Seconds, and bytes of the host's memory."""

    quiet: list[float] = field(default_factory=list)  # a step without a save
    saving: list[float] = field(default_factory=list)  # one with a save in flight
    quiet_cpu: list[float] = field(default_factory=list)
    saving_cpu: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # between the steps, while the rank does nothing else
    publications: list[float] = field(default_factory=list)  # the same
    first_start: float = 0.0
    shard_bytes: int = 0
    extra_bytes: int = 0  # at most, of the rank's job, beyond what it had before its first save
    load: float = 0.0

    def __str__(self) -> str:
        middle = statistics.median
        return (
            f"step {middle(self.quiet):.3f} s, during a save {middle(self.saving):.3f} s "
            f"({middle(self.saving) / middle(self.quiet):.3f}x; CPU time {middle(self.quiet_cpu):.3f} s, "
            f"{middle(self.saving_cpu):.3f} s, {middle(self.saving_cpu) / middle(self.quiet_cpu):.3f}x; "
            f"{len(self.saving)} of each); first start {self.first_start:.3f} s, then {middle(self.starts):.3f} s, "
            f"publication {middle(self.publications):.3f} s; shard {self.shard_bytes / 2**20:.0f} MiB, extra memory "
            f"{self.extra_bytes / 2**20:.0f} MiB ({self.extra_bytes / self.shard_bytes:.2f}x); load {self.load:.1f}"
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "num_samples"), [("fp32", 16), ("bf16", 2)])
def test_cost(ranks: RankPool, tmp_path: Path, precision: str, num_samples: int) -> None:
    """In bf16 two samples a step: matrix products of a CPU without bf16 instructions take 50 times those of fp32."""
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 512}
    recipe = tiny_recipe(tmp_path, optimizer={"distributed": True}, precision={"params": precision})
    language = {**recipe.model_dump(mode="json")["model"]["language"], "config": tiny_llama(331) | shape}
    recipe = tiny_recipe(
        tmp_path,
        model={"language": language},
        optimizer={"distributed": True},
        precision={"params": precision},
        training={"steps": 1000, "global_batch_size": num_samples, "micro_batch_size": min(4, num_samples)},
    )
    (cost,) = ranks.run(1, measure, recipe.model_dump(mode="json"), timeout=900)
    print(f"{precision}: {cost}")
    middle = statistics.median
    assert middle(cost.saving_cpu) <= TIME_LIMIT * middle(cost.quiet_cpu)
    if cost.load < (os.cpu_count() or 1):
        stops = middle(cost.starts) + middle(cost.publications)
        assert middle(cost.saving) + stops <= TIME_LIMIT * middle(cost.quiet)
    assert cost.extra_bytes <= cost.shard_bytes + WRITER_BYTES


def measure(recipe: dict[str, Any]) -> Cost:
    """Inside a rank, which from here on has a fork server of its own, as in a run: the memory below the rank counts."""
    from tests.helpers.ranks.rank_process import own_server

    own_server()
    config = Config.model_validate(recipe)
    job, cost = build_job(config, 1), Cost()
    batches = list(job.batches(4))  # the loader has its own cost
    saver, before = CheckpointSaver(config.checkpoint), 0
    for number in range(NUM_WARM_UP):
        make_step(job, batches, number)
        before = max(before, job_bytes())
    cost.extra_bytes = most_bytes(job, batches, saver) - before
    saver.close()
    saver = CheckpointSaver(config.checkpoint)
    cost.first_start, _ = save_and_step(job, batches, saver, 20, Cost())
    for number in range(30, 30 + NUM_PAIRS):  # both steps of a pair have the same batch
        clock, cpu = time.perf_counter(), time.process_time()
        make_step(job, batches, number)
        cost.quiet.append(time.perf_counter() - clock)
        cost.quiet_cpu.append(time.process_time() - cpu)
        start_seconds, checkpoint = save_and_step(job, batches, saver, number, cost)
        cost.starts.append(start_seconds)
    cost.shard_bytes = (checkpoint / "__0_0.distcp").stat().st_size
    cost.load = os.getloadavg()[0]
    saver.close()
    return cost


def make_step(job: Job, batches: list[Any], number: int) -> None:
    config = job.config
    schedule.apply(job.optimizer.param_groups, number, config.training.steps, config.optimizer, config.schedule)
    job.step(batches[number % len(batches)])


def save_and_step(job: Job, batches: list[Any], saver: CheckpointSaver, number: int, cost: Cost) -> tuple[float, Path]:
    """A save, and a step while it is in flight; waits for the end of the save."""
    clock = time.perf_counter()
    saver.start(job.state(number))
    start_seconds = time.perf_counter() - clock
    clock, cpu = time.perf_counter(), time.process_time()
    make_step(job, batches, number)
    cost.saving.append(time.perf_counter() - clock)
    cost.saving_cpu.append(time.process_time() - cpu)
    while saver.is_writing:
        time.sleep(0.01)
    clock = time.perf_counter()
    (checkpoint,) = saver.finish()
    cost.publications.append(time.perf_counter() - clock)
    return start_seconds, checkpoint


def most_bytes(job: Job, batches: list[Any], saver: CheckpointSaver) -> int:
    """The most that rank and writer have, with a writer as slow as can be, which begins when the rank has changed
    everything twice."""
    with mock.patch.object(saver_module, "Part", GatedPart):
        saver.start(job.state(900))
    save = saver._save
    assert save is not None
    most = 0
    for number in (900, 901):
        make_step(job, batches, number)
        most = max(most, job_bytes())
    gate_of(save.final).touch()
    while saver.is_writing:
        most = max(most, job_bytes())
    saver.finish()
    return most


def job_bytes() -> int:
    """What the rank and the processes below it have; of what they have together with others, each its share. The fork
    server is among them, which data workers need too: a writer begins with the server's pages, which cost nothing
    until one of the two changes them."""
    rank, total = psutil.Process(), 0
    for process in [rank, *rank.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has ended
            total += int(process.memory_full_info().pss)
    return total
