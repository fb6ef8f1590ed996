"""A side of a comparison: one fresh process per rank that builds a training job and runs rounds of its steps when told.

So neither side's memory, allocator, threads or patched functions are the other's: peak memory is a side's own, and the
side that waits sleeps on a pipe. The ranks of a side form a world of their own and begin every round together; a
round's time is the slowest rank's.

Hazard: a child whose parent is gone must end too. It does when it next reads its pipe, or when the collective it waits
in fails because another child has ended.
"""

import contextlib
import gc
import shutil
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Protocol

from megatron_vlm.config.loading import config_from_tree
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import MegatronVlmError
from megatron_vlm.runtime.launch import Launch

if TYPE_CHECKING:
    from megatron_vlm.data.batch import StepBatch

    from .synthetic import SampleSize

PRODUCT, TRANSFORMERS = "megatron_vlm", "transformers"
CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # see proc(5)


@dataclass(frozen=True)
class SideRequest:
    """Request to a child process: what it is to build.

    Args:
        name: TRANSFORMERS, or any other for the product's side.
        config: the recipe; scratch files go under its checkpoint directory.
        launch: this rank's place.
        num_batches: different batches, used over and over.
        num_steps: that will be run in all, for the learning rate.
        answers: share of the words that are trained, where the data set is made here.
        samples: the sizes of each sample where it is; empty: as many full rows as there are in the batches.
    """

    name: str
    config: Config
    launch: Launch
    num_batches: int
    num_steps: int
    answers: float
    samples: tuple["SampleSize", ...] = ()


@dataclass(frozen=True)
class Facts:
    """Facts that a side states before the first step, equal on all ranks."""

    device: str
    num_threads: int  # of torch, in one rank
    samples: int  # of a step; the others are means over the batches
    tokens: float  # padding left out
    row_tokens: float  # padding included
    trained_tokens: float
    media: float
    data_seconds: float  # to make a batch, in one process, outside the steps
    flops: float | None  # that a step needs, as the product counts them
    peak_flops: float  # that the ranks can do in a second
    peak_source: str


@dataclass(frozen=True)
class Round:
    """Several steps in a row; times are of one step, in the mean."""

    seconds: float  # of the slowest rank
    cpu_seconds: float  # of all threads of a rank, in the mean
    losses: tuple[float, ...]
    phase_seconds: dict[str, float]  # mean over ranks; empty where the side does not know them


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. On a GPU what torch allocated there at most; else the process's resident memory."""

    peak_bytes: int
    before_bytes: int  # before the model was built: interpreter, libraries, data


class Side(Protocol):
    """A job whose steps can be timed."""

    batches: list["StepBatch"]
    data_seconds: float
    replica_ranks: int  # that share a row
    row_tokens: list[int]  # by batch: of its rows on all ranks, padding included

    def step(self, number: int, exact_times: bool) -> tuple[Any, dict[str, float]]:
        """Trains on one batch -> (what `losses` makes a loss of, seconds by phase where the side knows them)."""
        ...

    def losses(self, found: list[Any]) -> list[float]:
        """The global losses of a round's steps; a collective, outside the time."""
        ...

    def flops(self, batch: "StepBatch", trained_tokens: int) -> int | None:
        """FLOPs of one step; None where the side does not count them."""
        ...


def serve(request: SideRequest, connection: Connection) -> None:
    """The child's main function: sends its Facts, then a Round or Memory per command, or the error that ended it."""
    try:
        from megatron_vlm.runtime.logging import get_logger, quiet_libraries

        quiet_libraries()
        get_logger("megatron_vlm").setLevel("WARNING")
        _serve(request, connection)
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except MegatronVlmError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"{request.name}, rank {request.launch.rank}: {traceback.format_exc()}"))


def _serve(request: SideRequest, connection: Connection) -> None:
    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.distributed import init_world, teardown

    config, launch = request.config, request.launch
    device = prepare(config.runtime.device, launch.local_world_size, one_queue=request.name != TRANSFORMERS)
    init_world(launch, device, config.runtime.timeout_seconds, f"bench/{request.name}")
    from torch.distributed import barrier

    scratch = Path(config.checkpoint.directory) / "bench" / request.name
    config = _with_data(request, scratch)
    from megatron_vlm.training.reporting.memory import process_memory

    before = process_memory().current_bytes
    side = _build(request, config)
    connection.send(_facts(side, config, launch.local_world_size))
    _reset_peak()
    while (command := connection.recv()) is not None:
        if command == "memory":
            connection.send(_gather(Memory(process_memory().peak_bytes, before)))
        else:
            first, count, exact_times = command
            connection.send(_run_round(side, range(first, first + count), exact_times))
    barrier()
    if launch.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # the other side's is still there
            scratch.parent.rmdir()
    teardown()


def _with_data(request: SideRequest, scratch: Path) -> Config:
    """The recipe on its own data, or on a data set made for it where its data file is not there."""
    from torch.distributed import barrier

    from megatron_vlm.data.sources import is_here
    from megatron_vlm.models.description import describe_model

    from . import synthetic

    config, is_first = request.config, request.launch.rank == 0
    changes: dict[str, Any] = {
        "checkpoint": {"directory": str(scratch), "resume": "never", "load": None},
        "data": {"num_workers": 0},
        "training": {"steps": request.num_steps, "epochs": None},
    }
    if is_first:
        shutil.rmtree(scratch, ignore_errors=True)
        if not is_here(config.data):
            model = describe_model(config.model)
            shape = synthetic.Shape(
                sequence_length=config.training.sequence_length,
                vocab_size=model.language.vocab_size,
                spec=model.media_spec,
                answers=request.answers,
            )
            num_samples = config.training.global_batch_size * request.num_batches
            full = (synthetic.SampleSize(shape.sequence_length, 1),) * num_samples
            synthetic.make(scratch / "data", shape, request.samples or full, config.data)
    barrier()
    if not is_here(config.data):
        changes = merge(changes, synthetic.sections(scratch / "data"))
    return config_from_tree(merge(config.model_dump(), changes), "the recipe with the benchmark's data")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _build(request: SideRequest, config: Config) -> Side:
    if request.name == TRANSFORMERS:
        from .llava import LlavaSide

        return LlavaSide(config, request.launch, request.num_batches)
    from .product import ProductSide

    return ProductSide(config, request.launch, request.num_batches)


def _facts(side: Side, config: Config, ranks_per_node: int) -> Facts:
    import torch
    from torch.distributed import group

    from megatron_vlm.config.megatron import DTYPES
    from megatron_vlm.planner.peak import peak_of_ranks
    from megatron_vlm.runtime.device import current_device

    assert group.WORLD is not None
    batches = side.batches
    of_ranks = _gather([batch.num_trained_tokens_local / side.replica_ranks for batch in batches])
    trained = [round(sum(of_batch)) for of_batch in zip(*of_ranks, strict=True)]
    flops = [side.flops(batch, tokens) for batch, tokens in zip(batches, trained, strict=True)]
    peak = peak_of_ranks(DTYPES[config.precision.params], group.WORLD, ranks_per_node)
    return Facts(
        device=torch.cuda.get_device_name() if current_device().type == "cuda" else "CPU",
        num_threads=torch.get_num_threads(),
        samples=len(batches[0].sample_ids),
        tokens=mean([batch.num_tokens for batch in batches]),
        row_tokens=mean(side.row_tokens),
        trained_tokens=mean(trained),
        media=mean([batch.num_media for batch in batches]),
        data_seconds=max(_gather(side.data_seconds)),
        flops=None if None in flops else mean(number for number in flops if number is not None),
        peak_flops=peak.flops_per_second,
        peak_source=peak.source,
    )


def _reset_peak() -> None:
    """Starts to count the process's peak memory anew."""
    import torch

    from megatron_vlm.runtime.device import current_device

    gc.collect()
    if current_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_REFS.write_text(RESET_PEAK)


def _run_round(side: Side, steps: range, exact_times: bool) -> Round:
    import torch
    from torch.distributed import barrier

    from megatron_vlm.runtime.device import current_device

    on_gpu = current_device().type == "cuda"
    found, phases = [], []
    gc.collect()
    barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    for number in steps:
        loss, phase_seconds = side.step(number, exact_times)
        found.append(loss)
        phases.append(phase_seconds)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    own = {name: sum(phase[name] for phase in phases) / len(steps) for name in phases[0]}
    ranks = _gather((seconds / len(steps), cpu_seconds / len(steps), own))
    return Round(
        seconds=max(rank[0] for rank in ranks),
        cpu_seconds=sum(rank[1] for rank in ranks) / len(ranks),
        losses=tuple(side.losses(found)),
        phase_seconds={name: sum(rank[2][name] for rank in ranks) / len(ranks) for name in own},
    )


def _gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    from torch.distributed import group

    from megatron_vlm.runtime.collectives import all_gather_objects

    assert group.WORLD is not None
    return all_gather_objects(value, group.WORLD)
