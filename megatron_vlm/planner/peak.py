"""The matrix products per second the ranks could do at most: what model FLOPs utilisation is measured against.

By the vendor's data sheet where the GPU is known, for dense matrices, without sparsity; elsewhere, so on every CPU, by
a short measurement on all ranks at the same time. A CPU's is taken over processor time, so that other work on the
machine does not lower it, and divided among ranks that share cores. What was measured is kept (`KEPT`), by processor,
ranks, threads and dtype: so the runs of a machine are measured against one number. Remove the file to have it measured
anew.

Sources: NVIDIA's data sheets of A100, A40, L40S, H100, H200 (SXM, PCIe, NVL), GH200, HGX B200 and GB200 NVL72. fp32
is without TF32, which torch leaves off for matrix products.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_vlm.errors import one_line
from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.environment import num_cores, own_cache
from megatron_vlm.runtime.files import read_json, read_text
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)

TERA = 1e12
DATA_SHEETS: dict[str, dict[torch.dtype, float]] = {  # words of a GPU's name -> FLOP/s
    name: {torch.bfloat16: bf16 * TERA, torch.float32: fp32 * TERA}
    for name, bf16, fp32 in (
        ("A100", 312, 19.5),
        ("A40", 149.7, 37.4),
        ("L40S", 362, 91.6),
        ("H100", 989, 67),
        ("H100 PCIe", 756, 51),
        ("H100 NVL", 835, 60),
        ("H200", 989, 67),
        ("H200 NVL", 835, 60),
        ("GH200", 989, 67),
        ("B200", 2250, 75),
        ("GB200", 2500, 80),
    )
}
MATRIX_SIZE = 512  # large enough for a CPU's full rate, small enough for several products in the time
MEASURED_SECONDS = 0.15
KEPT = "peak_flops.json"  # in the cache: {key: FLOP/s of one rank}
PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Peak:
    """`flops_per_second` of all ranks together, and where the number is from."""

    flops_per_second: float
    source: str


def peak_of_ranks(dtype: torch.dtype, group: ProcessGroup, ranks_per_node: int) -> Peak:
    """The group's peak in `dtype`; a collective call, which takes MEASURED_SECONDS the first time a device is unknown.

    Args:
        ranks_per_node: that share a machine, and so its processors.
    """
    name = torch.cuda.get_device_name() if current_device().type == "cuda" else "CPU"
    sheet, file = by_data_sheet(name, dtype), own_cache() / KEPT
    device = processor() if name == "CPU" else name
    key = f"{device}, {ranks_per_node} ranks of {torch.get_num_threads()} threads, {dtype}"
    key += ", by processor time" if name == "CPU" else ""
    known = all_gather_objects(sheet or kept(file).get(key), group)  # also: all ranks start measuring together
    own = known[group.rank()]
    if own is None or (sheet is None and not all(known)):  # one that is new is measured beside the others at work
        own = measure(dtype, current_device(), ranks_per_node)
        keep(file, key, own)
    total = math.fsum(all_gather_objects(float(own), group))
    source = "data sheet" if sheet is not None else f"measured, kept in {file}"
    return Peak(total, f"{name}, {str(dtype).removeprefix('torch.')}, {source}")


def processor() -> str:
    """The model of this machine's processors, as the kernel calls it."""
    try:
        lines = read_text(PROCESSORS).splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def kept(file: Path) -> dict[str, float]:
    """Measurements kept from before, by key; nothing where there is no such file, or it is damaged."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: flops for key, flops in entries if isinstance(flops, float) and 0 < flops < math.inf}


def keep(file: Path, key: str, flops_per_second: float) -> None:
    """Adds an entry. Several ranks may do so at once: the last one's file stays, and is whole. Where nothing can be
    written, nothing is kept: the next run measures again."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({**kept(file), key: flops_per_second}, indent=1), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        logger.info("the peak that was measured cannot be kept: %s", one_line(error))


def by_data_sheet(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the GPU whose name has all words of an entry; the entry with the most words counts."""
    words = set(name.replace("-", " ").split())
    fitting = [entry for entry in DATA_SHEETS if words.issuperset(entry.split())]
    return DATA_SHEETS[max(fitting, key=len)].get(dtype) if fitting else None


def measure(
    dtype: torch.dtype, device: torch.device, ranks_per_node: int = 1, seconds: float = MEASURED_SECONDS
) -> float:
    """FLOP/s of one rank's square matrix products, after one to warm up. On a CPU: of `ranks_per_node` ranks that
    multiply at once and have its cores to themselves."""
    size = MATRIX_SIZE if device.type == "cpu" else 16 * MATRIX_SIZE
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))  # no random state is touched
    product = left @ right
    started, used_before, count = _now(device), time.process_time(), 0
    while (elapsed := _now(device) - started) < seconds:
        torch.mm(left, right, out=product)
        count += 1
    if device.type == "cpu":
        threads = torch.get_num_threads()
        at_work = min(threads, num_cores() / ranks_per_node)  # cores of one rank
        elapsed = (time.process_time() - used_before) / at_work
    return 2.0 * size**3 * count / elapsed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
