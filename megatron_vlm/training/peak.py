"""The matrix products per second the ranks could do at most: what model FLOPs utilisation is measured against.

By the vendor's data sheet where the GPU is known, for dense matrices, without sparsity; elsewhere, so on every CPU, by
a short measurement on all ranks at the same time, because ranks that share cores share their peak too.

Sources: NVIDIA's data sheets of A100, A40, L40S, H100, H200 (SXM, PCIe, NVL), GH200, HGX B200 and GB200 NVL72. fp32
is without TF32, which torch leaves off for matrix products.
"""

import time
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.device import current_device

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


@dataclass(frozen=True)
class Peak:
    """`flops_per_second` of all ranks together, and where the number is from."""

    flops_per_second: float
    source: str


def peak_of_ranks(dtype: torch.dtype, group: ProcessGroup) -> Peak:
    """The group's peak in `dtype`; a collective call, which takes MEASURED_SECONDS where a device is unknown."""
    name = torch.cuda.get_device_name() if current_device().type == "cuda" else "CPU"
    known = all_gather_objects(by_data_sheet(name, dtype), group)  # also: all ranks start measuring together
    own = known[group.rank()] or measure(dtype, current_device())
    total = sum(all_gather_objects(own, group))
    return Peak(total, f"{name}, {str(dtype).removeprefix('torch.')}, {'data sheet' if all(known) else 'measured'}")


def by_data_sheet(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the GPU whose name has all words of an entry; the entry with the most words counts."""
    words = set(name.replace("-", " ").split())
    fitting = [entry for entry in DATA_SHEETS if words.issuperset(entry.split())]
    return DATA_SHEETS[max(fitting, key=len)].get(dtype) if fitting else None


def measure(dtype: torch.dtype, device: torch.device, seconds: float = MEASURED_SECONDS) -> float:
    """FLOP/s of square matrix products, after one to warm up."""
    size = MATRIX_SIZE if device.type == "cpu" else 16 * MATRIX_SIZE
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))  # no random state is touched
    product = left @ right
    started, count = _now(device), 0
    while (elapsed := _now(device) - started) < seconds:
        torch.mm(left, right, out=product)
        count += 1
    return 2.0 * size**3 * count / elapsed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
