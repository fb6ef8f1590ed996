"""The choice of device, and each name that stands in for CUDA on the CPU: that it works, and that it was needed."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime import device
from megatron_vlm.runtime.logging import get_logger
from tests.helpers.cuda_stand_ins import EXERCISES
from tests.helpers.ranks.pool import RankPool


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not decided yet, and that redirects nothing when it does."""
    monkeypatch.setattr(device, "_prepared", None)
    monkeypatch.setattr(device, "_redirect_torch", lambda torch: None)
    monkeypatch.setattr(device, "_redirect_megatron", lambda torch: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return monkeypatch


def with_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("requested", "gpus", "local_ranks", "expected"),
    [
        ("cpu", 2, 2, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("auto", 2, 4, "cpu"),
        ("cuda", 2, 2, "cuda"),
    ],
)
def test_decision(unprepared: pytest.MonkeyPatch, requested, gpus: int, local_ranks: int, expected: str) -> None:
    with_gpus(unprepared, gpus)
    assert not device.is_prepared()
    assert device.prepare(requested, local_ranks).type == expected
    assert device.prepare("auto", local_ranks).type == expected  # again: no change
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0,1" if expected == "cuda" else "")


@pytest.mark.parametrize(
    ("requested", "set_before", "expected"), [("auto", None, "1"), ("auto", "8", "8"), ("cpu", None, None)]
)
def test_a_gpu_has_one_queue_unless_told(
    unprepared: pytest.MonkeyPatch, requested, set_before: str | None, expected: str | None
) -> None:
    with_gpus(unprepared, 1)
    unprepared.setenv("CUDA_DEVICE_MAX_CONNECTIONS", set_before or "")  # so that it is put back afterwards
    if set_before is None:
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    unprepared.setattr(device, "_prepared", None)
    device.prepare(requested, one_queue=False)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == set_before
    unprepared.setattr(device, "_prepared", None)
    device.prepare(requested)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_unused_gpus_are_mentioned(unprepared: pytest.MonkeyPatch) -> None:
    with_gpus(unprepared, 1)
    said = []
    unprepared.setattr(get_logger(device.__name__), "warning", lambda message, *values: said.append(message % values))
    device.prepare("auto", 4)
    assert said == ["runtime.device auto: 4 ranks but 1 GPUs: using the CPU"]


def test_cuda_without_enough_gpus_is_refused(unprepared: pytest.MonkeyPatch) -> None:
    with_gpus(unprepared, 1)
    with pytest.raises(ConfigError, match="found cuda with 1 GPUs on this machine, needed 2"):
        device.prepare("cuda", 2)


def test_a_second_decision_must_not_contradict_the_first(unprepared: pytest.MonkeyPatch) -> None:
    device.prepare("cpu")
    with pytest.raises(ConfigError, match="found cuda, but this process already works on cpu"):
        device.prepare("cuda")


def test_every_redirected_name_has_an_exercise() -> None:
    assert set(EXERCISES) == set(device.REDIRECTED)


def run_exercise(name: str) -> None:
    EXERCISES[name]()


@pytest.mark.parametrize("name", device.REDIRECTED)
def test_stand_in_works(ranks: RankPool, name: str) -> None:
    ranks.run(1, run_exercise, name)


def test_every_redirection_is_needed() -> None:
    """Without `prepare` each exercise fails on a machine without CUDA: none of them is an empty gesture."""
    program = (
        "import megatron.core, tests.helpers.cuda_stand_ins as c\n"
        "for name, exercise in c.EXERCISES.items():\n"
        "    try: exercise()\n"
        "    except Exception: continue\n"
        "    print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# What megatron-core uses of CUDA, read from its source: an upgrade that adds a name fails here.

SCANNED = [  # files and folders of megatron/core that the package runs on the CPU
    "parallel_state.py",
    "utils.py",
    "optimizer",
    "distributed",
    "pipeline_parallel",
    "tensor_parallel",
    "dist_checkpointing",
    "transformer",
    "models/gpt/gpt_model.py",
    "models/common",
]
NOT_RUN = [  # below SCANNED, but of features without a CPU form, or that no recipe key turns on
    "distributed/fsdp",
    "distributed/torch_fully_sharded_data_parallel.py",
    "optimizer/cpu_offloading",
    "pipeline_parallel/bridge_communicator.py",
    "pipeline_parallel/fine_grained_activation_offload.py",
    "pipeline_parallel/hybrid_cp_schedule.py",
    "tensor_parallel/inference_layers.py",
    "transformer/cuda_graphs.py",
    "transformer/custom_layers",
    "transformer/fsdp_dtensor_checkpoint.py",
]
ELSEWHERE = {"symm_mem.empty": "symmetric memory of NCCL, in inference only"}
FINE_AS_THEY_ARE = {
    "BFloat16Tensor": "a type",
    "CUDAGraph": "a type",
    "FloatTensor": "a type",
    "HalfTensor": "a type",
    "OutOfMemoryError": "a type",
    "amp": "decorators, harmless on the CPU",
    "clock_rate": "straggler detector, off",
    "power_draw": "straggler detector, off",
    "temperature": "straggler detector, off",
    "utilization": "straggler detector, off",
    "default_generators": "in functions that are redirected",
    "device_count": "0; used by the persistent checkpoint writer, which is not",
    "empty_cache": "does nothing without CUDA",
    "is_available": "False is right",
    "set_device": "only in the persistent checkpoint writer",
}


def megatron_files() -> list[Path]:
    spec = importlib.util.find_spec("megatron.core")
    root = Path(spec.submodule_search_locations[0])
    files = [f for name in SCANNED for f in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))]
    left_out = [root / name for name in NOT_RUN]
    return [f for f in files if not any(f == out or out in f.parents for out in left_out)]


def dotted(node: ast.expr) -> str:
    """`torch.cuda.nvtx.range_push` for the node that means it; what is not a chain of names ends it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_everything_megatron_uses_of_torch_cuda_is_accounted_for() -> None:
    files = megatron_files()
    assert len(files) > 60
    unknown, used = {}, set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            parts = name.split(".")
            used.update(parts[2:3] if parts[:2] == ["torch", "cuda"] else [])
            known = parts[:2] != ["torch", "cuda"] or len(parts) == 2 or parts[2] in FINE_AS_THEY_ARE
            if not (known or any(name == n or n.startswith(f"{name}.") for n in device.REDIRECTED)):
                unknown[name] = file
    assert unknown == {}
    assert set(FINE_AS_THEY_ARE) <= used  # an excuse that nothing needs any more goes


def test_everything_megatron_creates_on_cuda_is_redirected() -> None:
    unknown = {}
    for file in megatron_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                on_cuda = any(
                    k.arg == "device" and isinstance(k.value, ast.Constant) and str(k.value.value).startswith("cuda")
                    for k in node.keywords
                )
                name = dotted(node.func)
                if on_cuda and name not in device.REDIRECTED and name not in ELSEWHERE:
                    unknown[name] = file
    assert unknown == {}
