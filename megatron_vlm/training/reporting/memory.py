"""Memory of a rank: what its process or GPU holds, and the model's own share of it, tensor by tensor.

The model's share is counted by storage, not by tensor, so that nothing is counted twice: megatron-core's parameters,
gradients and fp32 main parameters are largely views of a few long buffers, or of each other.

Hazard: the optimizer allocates its moments in its first update; before that they are none.
"""

import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_vlm.runtime.device import current_device
from megatron_vlm.training.job import Job

KINDS = ("parameters", "gradients", "optimizer state")
GIBIBYTE = 2**30


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes this rank holds: allocated by torch on its GPU, or resident in its process on the CPU."""

    current_bytes: int
    peak_bytes: int


def process_memory() -> ProcessMemory:
    """Now, and at most so far."""
    if current_device().type == "cuda":
        return ProcessMemory(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    peak_kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ProcessMemory(psutil.Process().memory_info().rss, peak_kibibytes * 1024)


def model_memory(job: Job) -> dict[str, dict[str, int]]:
    """Bytes on this rank by component, `language` and `vision` (tower and projector), and by KINDS."""
    seen: set[int] = set()
    bytes_of: dict[str, dict[str, int]] = {"language": {}, "vision": {}}
    for kind, tensors in zip(KINDS, (_parameters, _gradients, _optimizer_state), strict=True):
        for component, bytes_by_kind in bytes_of.items():
            bytes_by_kind[kind] = _new_bytes(tensors(job, component), seen)
    return bytes_of


def _chunks(job: Job, component: str) -> list[DistributedDataParallel]:
    return job.language if component == "language" else [job.vision]


def _parameters(job: Job, component: str) -> Iterator[Tensor]:
    for chunk in _chunks(job, component):
        yield from chunk.parameters()


def _gradients(job: Job, component: str) -> Iterator[Tensor]:
    """megatron-core's buffers, and what torch keeps beside them."""
    for chunk in _chunks(job, component):
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            yield buffer.grad_data
    for parameter in (*_parameters(job, component), *(main for main, _ in _optimized(job, component))):
        if parameter.grad is not None:
            yield parameter.grad


def _optimizer_state(job: Job, component: str) -> Iterator[Tensor]:
    """Main parameters where they are copies (the parameters themselves are seen by now), and moments."""
    for main, state in _optimized(job, component):
        yield main
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _optimized(job: Job, component: str) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(main parameter, its state) of a component's optimizers."""
    for part in job.optimizer.chained_optimizers:
        for group in part.param_groups:
            if (group["component"] == "language") == (component == "language"):
                for main in group["params"]:
                    yield main, part.optimizer.state.get(main, {})


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages that are not in `seen`, which they join."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
