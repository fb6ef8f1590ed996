"""The tensors of each file of an exported directory, decided before any is read; and writing these files.

A file's header fixes every byte but the tensors' own, and where each stands, so several threads can write one file.
A header that came with the model is used again as it is: the file comes back byte for byte, whoever wrote it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_vlm.checkpoint.integrity import send_to_disk, write_at
from megatron_vlm.conversion.mappings import COMPUTED_BUFFERS, HEAD
from megatron_vlm.conversion.transfer.origin import is_as_referenced
from megatron_vlm.conversion.transfer.origin_record import Origin
from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.errors import ConversionError

MAX_SHARD_BYTES = 5_000_000_000
TOWER_FILE = "model-vision-tower.safetensors"  # of a tower that was only named by the origin, and has trained since
MAX_THREADS = 4  # further ones would wait for the disk
_ALIGNMENT_BYTES = 8
_RUN_BYTES = 2**26  # that a thread writes at a time, of neighbours: what ours is made of is read once
_CODES = {getattr(torch, name): dtype.code for name, dtype in DTYPES.items()}


class Readable(Protocol):
    """Tensors by canonical name."""

    def names(self) -> Collection[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor: canonical name, name on the disk, and as what it is written."""

    name: str
    disk_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Size on the disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """A safetensors file. `is_returned`: its header is that of the file the model came with."""

    file: str
    tensors: Sequence[PlannedTensor]
    header: bytes
    is_returned: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def runs(self) -> Iterator[tuple[int, list[PlannedTensor]]]:
        """Its tensors in order, in groups to be written at once, each with its first byte's place in the file."""
        start, run, size_bytes = len(self.header), list[PlannedTensor](), 0
        for tensor in self.tensors:
            run.append(tensor)
            size_bytes += tensor.size_bytes
            if size_bytes >= _RUN_BYTES:
                yield start, run
                start, run, size_bytes = start + size_bytes, [], 0
        if run:
            yield start, run


def write_shards(folder: Path, shards: Sequence[ShardPlan], source: Readable, advance: Callable[[int], None]) -> None:
    """Writes the files, to the disk. In memory are, per thread, the tensor being written and what `source` keeps for
    it: `NativeSource` two parameters, and the bytes it reads the next one from.

    Args:
        advance: told the bytes of each tensor written; called by several threads.

    Raises:
        OSError: the disk. ConversionError: a value that the dtype to be written cannot hold. Nothing is being written
            any more when one is raised.
    """

    def write_run(job: tuple[int, int, list[PlannedTensor]]) -> None:
        handle, start, run = job
        place = start
        for planned in run:
            tensor = _rounded(source.read(planned.name), planned).contiguous()
            assert tuple(tensor.shape) == planned.shape, planned.name
            write_at(handle, place, tensor.reshape(-1).view(torch.uint8).numpy().data)
            place += planned.size_bytes
            advance(planned.size_bytes)
        send_to_disk(handle, start, place - start)

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / shard.file, "wb", buffering=0)) for shard in shards]
        jobs = []
        for file, shard in zip(files, shards, strict=True):
            write_at(file.fileno(), 0, shard.header)
            jobs += [(file.fileno(), *run) for run in shard.runs()]
        pool = stack.enter_context(ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)))
        list(pool.map(write_run, jobs))
        list(pool.map(lambda file: os.fsync(file.fileno()), files))


def _rounded(tensor: Tensor, planned: PlannedTensor) -> Tensor:
    """Rounds to the dtype to be written. Raises ConversionError where a finite value is beyond it."""
    rounded = tensor.to(planned.dtype)
    if rounded.dtype != tensor.dtype and not torch.equal(rounded.isfinite(), tensor.isfinite()):
        kind, most = str(planned.dtype).removeprefix("torch."), torch.finfo(planned.dtype).max
        raise ConversionError(
            f"{planned.disk_name}: found {tensor[tensor.isfinite()].abs().max().item():g}, needs values up to {most:g} "
            f"for {kind}; choose another --dtype"
        )
    return rounded


def plan_returned(
    origin: Origin, source: Readable, disk_name: Callable[[str], str], dtype: torch.dtype | None, is_same: bool
) -> list[ShardPlan] | None:
    """The files the model came with; None where its tensors have other names or shapes by now.

    Args:
        dtype: of all tensors; None: each as it came.
        is_same: whether the origin's config still fits. Where it does not, tensors that are computed from a config are
            left out, and a tower that was only named is written, whether or not it has trained.
    """
    shards = []
    rest = {name for name in source.names() if is_same or not COMPUTED_BUFFERS.search(name)}
    for file, came in origin.weights.items():
        tensors = [t for t in came if is_same or not COMPUTED_BUFFERS.search(t.name)]
        known = {*source.names(), HEAD}  # a tied head is often stored all the same
        if any(t.name not in known or t.shape != source.shape(t.name) for t in tensors):
            return None
        planned = [PlannedTensor(t.name, t.disk_name, _dtype(t.torch_dtype, dtype), t.shape) for t in tensors]
        header = origin.header(file) if dtype is None and len(tensors) == len(came) else None
        name = file if file.endswith(".safetensors") else _renamed(file)
        shards.append(ShardPlan(name, planned, header or header_of(planned), header is not None))
        rest -= {t.name for t in tensors}
    if is_same:
        named = [name for name in rest if name in origin.referenced]
        rest -= {name for name in named if is_as_referenced(source.read(name), origin.referenced[name])}
    if rest:
        extra = [PlannedTensor(n, disk_name(n), dtype or source.dtype(n), source.shape(n)) for n in sorted(rest)]
        shards.append(ShardPlan(TOWER_FILE, extra, header_of(extra)))
    return shards


def _dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return own if wanted is None or not own.is_floating_point else wanted


def _renamed(pickle: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`: no pickle is ever written."""
    return f"{pickle.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"


def plan_fresh(
    names: Collection[str],
    source: Readable,
    disk_name: Callable[[str], str],
    dtype_of: Callable[[str], torch.dtype | None],
) -> list[ShardPlan]:
    """Files of at most 5 GB, in transformers' names.

    Args:
        dtype_of: canonical name -> dtype to write, None for that of the checkpoint.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size_bytes = 0
    for name in sorted(names):
        tensor = PlannedTensor(name, disk_name(name), dtype_of(name) or source.dtype(name), source.shape(name))
        if groups[-1] and size_bytes + tensor.size_bytes > MAX_SHARD_BYTES:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += tensor.size_bytes
    if len(groups) == 1:
        return [ShardPlan("model.safetensors", groups[0], header_of(groups[0]))]
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return [ShardPlan(file, group, header_of(group)) for file, group in zip(files, groups, strict=True)]


def header_of(tensors: Sequence[PlannedTensor]) -> bytes:
    """The header of a safetensors file that holds these, in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.size_bytes
        code = _CODES[tensor.dtype]
        entries[tensor.disk_name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[ShardPlan]) -> str:
    """`model.safetensors.index.json`."""
    places = {tensor.disk_name: shard.file for shard in shards for tensor in shard.tensors}
    size_bytes = sum(shard.size_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(places.items()))}, indent=2)
