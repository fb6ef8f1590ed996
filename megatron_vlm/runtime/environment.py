"""Resources of this machine for a training job: cores, memory, GPUs, room for workers, whether processes can meet.

Each probe gives findings and never raises: tools/doctor.py is for machines on which something is wrong. Whatever could
end the asking process with it (importing torch against the wrong driver, two ranks that never meet) happens in children
with a time limit.

Hazard: a container shows the whole machine's memory and cores; what it may use stands in its control group.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_vlm.runtime.launch import environment_of_child

State = Literal["ok", "note", "absent", "broken"]
GIB = 2**30
MIN_SHARED_GIB = 1.0  # docker gives 64 MiB unless told; a step's images of several workers are more
MIN_OPEN_FILES = 4096
CHILD_SECONDS = 120
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "VILA_SLURM_", "TORCHELASTIC_")
LIBRARY_KNOBS = ("CUDA_", "NCCL_", "GLOO_", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
DRIVER_FILE, MEMORY_LIMIT_FILE = Path("/proc/driver/nvidia/version"), Path("/sys/fs/cgroup/memory.max")

IMPORTS = """
import json, torch
from megatron.core import optimizer
from transformers import CLIPImageProcessorPil
fused = None if optimizer.USING_PYTORCH_OPTIMIZER else optimizer.Adam.__module__.split(".")[0]
facts = {"cuda": torch.version.cuda, "gpus": [], "nccl": None, "fused_adam": fused}
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        facts["gpus"].append(f"{of.name}, {of.total_memory / 2**30:.0f} GiB, sm_{of.major}{of.minor}")
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(facts))
"""
MEETING = """
import sys
import torch, torch.distributed as dist
backend, rank, size, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
dist.init_process_group(backend, store=dist.FileStore(file, size), rank=rank, world_size=size)
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
one = torch.ones(1024, device=device)
dist.all_reduce(one)
assert one.unique().tolist() == [size], one
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """One line of a report. `state`: absent is optional and not there, a note is worth knowing, broken must be mended.
    `advice`: what to do about it. `passed_over`: of what could have been taken, what was not, and the reason. `unused`:
    why nothing takes it yet."""

    name: str
    state: State
    value: str
    advice: str = ""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    unused: str | None = None


def machine() -> Iterator[Finding]:
    """Cores, memory, shared memory, open files, folders to write to."""
    yield Finding("cores", "ok", f"{num_cores()} of {os.cpu_count()}")
    if is_busy():
        yield Finding("load", "note", f"{os.getloadavg()[0]:.1f} processes running", "busy: run this when it is idle")
    yield Finding("memory", "ok", f"{memory_bytes() / GIB:.1f} GiB")
    yield _shared_memory()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    advice = "" if limit >= MIN_OPEN_FILES else f"ulimit -n {MIN_OPEN_FILES}, or workers run out of them"
    yield Finding("open files", "note" if advice else "ok", f"at most {limit:,}", advice)
    yield _writable(
        "temporary files", Path(tempfile.gettempdir()), "broken", "set TMPDIR to a folder that can be written"
    )
    yield _writable("model cache", model_cache(), "note", "set HF_HOME to a folder that can be written")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def is_busy() -> bool:
    """Whether more processes than there are cores have been at work in the last minute."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def late(name: str, value: str, advice: str) -> Finding:
    """The finding of a probe that was not done in time: on a busy machine that is no fault of what was probed."""
    if not is_busy():
        return Finding(name, "broken", value, advice)
    load = f"the machine is busy: {os.getloadavg()[0]:.1f} processes running on {os.cpu_count()} cores"
    return Finding(name, "note", f"{value}, but {load}", "run this again when it is idle")


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT_FILE.read_text().strip() if MEMORY_LIMIT_FILE.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def model_cache() -> Path:
    """The folder where Hugging Face keeps its downloads."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", default))


def own_cache() -> Path:
    """The folder where this package keeps what it has measured of the machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vlm"


def launcher_variables() -> dict[str, str]:
    """The variables that decide who this process is among its job's, and those that libraries under it follow."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith((*LAUNCHERS, *LIBRARY_KNOBS))}


def accelerators() -> tuple[list[Finding], int]:
    """torch, megatron-core and transformers imported in a child, its GPUs, and how many there are."""
    try:
        child = _child(IMPORTS)
        done = subprocess.run(child, capture_output=True, text=True, timeout=CHILD_SECONDS, env=environment_of_child())
    except subprocess.TimeoutExpired:
        return [late("imports", f"not done after {CHILD_SECONDS} s", "look for a hanging file system")], 0
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        advice = (
            "python -c 'import torch, megatron.core; from transformers import CLIPImageProcessorPil' shows it whole"
        )
        return [Finding("imports", "broken", lines[-1], advice)], 0
    facts = json.loads(done.stdout.splitlines()[-1])
    adam = f"fused Adam of {facts['fused_adam']}" if facts["fused_adam"] else "no fused Adam"
    found = [Finding("imports", "ok", f"torch, megatron.core, transformers; {adam}")]
    if facts["gpus"]:
        driver = DRIVER_FILE.read_text().splitlines()[0] if DRIVER_FILE.is_file() else "driver unknown"
        found += [Finding(f"GPU {number}", "ok", gpu) for number, gpu in enumerate(facts["gpus"])]
        found.append(Finding("CUDA", "ok", f"{facts['cuda']}, NCCL {facts['nccl']}; {driver}"))
    elif DRIVER_FILE.is_file() and facts["cuda"] is None:
        found.append(Finding("GPU", "note", "there is a driver, but torch is a CPU build", "install torch for CUDA"))
    else:
        found.append(Finding("GPU", "absent", "none seen by torch", "everything runs on the CPU over gloo"))
    return found, len(facts["gpus"])


def meeting(backend: str, num_processes: int, limit_seconds: float = CHILD_SECONDS) -> Finding:
    """Whether local processes can form a group and reduce over it: children that do."""
    name, started = f"{backend}, {num_processes} process{'es' if num_processes > 1 else ''}", time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            _child(MEETING, backend, str(rank), str(num_processes), f"{folder}/store") for rank in range(num_processes)
        ]
        environment = environment_of_child()
        ranks = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
            for command in commands
        ]
        try:
            errors = [rank.communicate(timeout=limit_seconds)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            advice = "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface to use"
            return late(name, f"did not meet within {limit_seconds:.0f} s", advice)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    failed = [error for rank, error in zip(ranks, errors, strict=True) if rank.returncode]
    if failed:
        reason = (failed[0].strip().splitlines() or ["ended without a word"])[-1]
        return Finding(name, "broken", reason, "this is what every training rank does first")
    return Finding(name, "ok", f"all-reduce right, {time.perf_counter() - started:.1f} s")


def _child(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", program, *arguments]


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", "broken", error.strerror or str(error), "data workers hand images over through it")
    small = size.total < MIN_SHARED_GIB * GIB
    advice = "docker run --shm-size 16g (or --ipc host), or data.num_workers=0" if small else ""
    return Finding(
        "/dev/shm", "note" if small else "ok", f"{size.free / GIB:.1f} of {size.total / GIB:.1f} GiB", advice
    )


def _writable(name: str, folder: Path, otherwise: State, advice: str) -> Finding:
    """Whether a file can be made in the folder, or the folder made where it is not there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return Finding(name, "ok", str(folder))
    except OSError as error:
        return Finding(name, otherwise, f"{folder}: {error.strerror}", advice)
