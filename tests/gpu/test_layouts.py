"""The master test's layouts that one GPU can run: fp32 on it against fp32 on the CPU, one process each; bf16 beside it.

Both sides are the product's own job in a fresh interpreter, which the layout check brings along. The CPU is the
reference that the other layouts are held to. Tolerances: losses and gradient norms 1e-5 relative; first gradients per
tensor, in the L2 norm, 1e-4 of (its norm + 1e-3 of the norm of all); five-step updates 1e-3 likewise, ten to a thousand
times what another order of sums makes on the CPU. Updates of tensors whose gradient is under 1e-6 of the total are left
out: there Adam turns rounding into whole steps. In bf16 the losses stay within 5e-3.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.config.schema import Config
from megatron_vlm.training.layout_check.record import Record
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT, environment

STEPS = 5
LIMIT_SECONDS = 150
NUMBERS, GRADIENTS, UPDATES = 1e-5, 1e-4, 1e-3
BF16_LOSS = 5e-3
NOT_COMPARED_BELOW = 1e-6  # of the total gradient norm

on_gpu = pytest.mark.gpu

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distributed-optimizer": {"optimizer": {"distributed": True}},
    "micro-batches-of-two": {"training": {"micro_batch_size": 2}},
    "four-windows": {"training": {"media_window": 2}},
    "recompute-full": {"training": {"recompute": {"language": "full", "vision": "full"}}},
    "recompute-selective": {"training": {"recompute": {"language": "selective"}}},
    "projector-only": {"model": {"train": {"language": False, "vision": False, "projector": True}}},
}


def recipe(folder: Path, device: str, layout: dict[str, Any], params: str = "fp32") -> Config:
    """Rates that differ by component, no warm-up."""
    base = {
        "runtime": {"device": device},
        "precision": {"params": params},
        "optimizer": {"lr": 1e-3, "lr_projector": 3e-3, "lr_vision": 2e-3, "weight_decay": 0.1},
        "schedule": {"warmup_ratio": 0.0},
        "training": {"steps": STEPS},
    }
    tree = tiny_recipe(folder, **base).model_dump(mode="json")
    for section, keys in layout.items():
        tree[section] |= keys
    return Config.model_validate(tree)


def run(config: Config, folder: Path) -> Record:
    """All steps of a recipe by one process."""
    written, record = folder / f"{config.runtime.device}.json", folder / f"{config.runtime.device}.pt"
    written.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "megatron_vlm.training.layout_check.reference", str(written), str(record)]
    log = folder / f"{config.runtime.device}.log"
    with log.open("w") as out:
        process = subprocess.Popen(  # it ends when its standard input is closed
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        assert process.wait(LIMIT_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.communicate()
    return Record(**torch.load(record, weights_only=True))


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference of a layout; made once for all those that leave the model alone."""
    folder = tmp_path_factory.mktemp("layouts")
    known: dict[str, Record] = {}

    def get(layout: dict[str, Any]) -> tuple[Path, Record]:
        model = {"model": layout["model"]} if "model" in layout else {}
        if repr(model) not in known:
            known[repr(model)] = run(recipe(folder, "cpu", model), folder)
        return folder, known[repr(model)]

    return get


@on_gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_gpu_computes_what_the_cpu_does(on_the_cpu: Any, name: str) -> None:
    folder, wanted = on_the_cpu(LAYOUTS[name])
    compare(wanted, run(recipe(folder, "cuda", LAYOUTS[name]), folder))


@on_gpu
@pytest.mark.timeout(400)
def test_bf16_stays_close(on_the_cpu: Any) -> None:
    folder, wanted = on_the_cpu({})
    found = run(recipe(folder, "cuda", {}, params="bf16"), folder)
    assert found.sample_ids == wanted.sample_ids
    for step, (a, b) in enumerate(zip(wanted.losses, found.losses, strict=True)):
        assert abs(a - b) <= BF16_LOSS * a, f"loss of step {step + 1}: {b}, in fp32 {a}"
    assert found.losses != wanted.losses


def compare(wanted: Record, found: Record) -> None:
    """Raises AssertionError naming what differs by more than the tolerances above."""
    assert found.sample_ids == wanted.sample_ids, "sample_ids differ"
    assert found.before.keys() == wanted.before.keys()
    other = [name for name, tensor in wanted.before.items() if not torch.equal(tensor, found.before[name])]
    assert not other, f"start from other weights: {', '.join(other)}"
    for what in ("losses", "norms"):
        for step, (a, b) in enumerate(zip(getattr(wanted, what), getattr(found, what), strict=True)):
            assert abs(a - b) <= NUMBERS * abs(a), f"{what} of step {step + 1}: {b:.9f}, on the CPU {a:.9f}"
    gradients = wanted.gradients
    faint = {name for name in gradients if norm(gradients[name]) <= NOT_COMPARED_BELOW * total(gradients)}
    for what, tolerance in (("gradients", GRADIENTS), ("updates", UPDATES)):
        left_out = faint if what == "updates" else set()
        failures = list(differences(getattr(wanted, what), getattr(found, what), tolerance, left_out))
        assert not failures, f"{what} differ: " + "; ".join(failures)


def differences(
    wanted: dict[str, Tensor], found: dict[str, Tensor], tolerance: float, left_out: set[str]
) -> Iterator[str]:
    assert found.keys() == wanted.keys()
    allowed = tolerance * 1e-3 * total(wanted)
    for name in wanted.keys() - left_out:
        distance = norm(wanted[name] - found[name])
        if not distance <= tolerance * norm(wanted[name]) + allowed:
            yield f"{name} by {distance:.1e} of {norm(wanted[name]):.1e}"


def norm(tensor: Tensor) -> float:
    return float(tensor.float().norm())


def total(tensors: dict[str, Tensor]) -> float:
    return math.hypot(*map(norm, tensors.values()))


def record(**changed: Any) -> Record:
    whole = {"sample_ids": [["a"]], "losses": [2.0], "norms": [1.0]}
    for name, value in (("before", 1.0), ("gradients", 0.5), ("updates", 0.1)):
        whole[name] = {"weight": torch.full((4, 4), value), "faint": torch.full((4,), 1e-8 * value)}
    return Record(0, **{**whole, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"updates": {"weight": torch.full((4, 4), 0.1), "faint": torch.full((4,), 0.1)}}, None),
        ({"sample_ids": [["b"]]}, "sample_ids"),
        ({"before": {"weight": torch.ones(4, 4), "faint": torch.ones(4)}}, "start from other weights: faint"),
        ({"losses": [2.0001]}, "losses of step 1"),
        ({"norms": [math.nan]}, "norms of step 1"),
        ({"gradients": {"weight": torch.full((4, 4), 0.501), "faint": torch.zeros(4)}}, "gradients differ: weight"),
        ({"updates": {"weight": torch.full((4, 4), 0.11), "faint": torch.zeros(4)}}, "updates differ: weight"),
    ],
)
def test_the_comparison_can_fail(changed: dict[str, Any], message: str | None) -> None:
    """On any machine."""
    if message is None:
        compare(record(), record(**changed))
    else:
        with pytest.raises(AssertionError, match=message):
            compare(record(), record(**changed))
