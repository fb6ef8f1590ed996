"""What a command imports before it works: by lists of modules in the fast lane, by processor time in the slow one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks.processes import ROOT, environment
from tools.benchmarks.startup import import_times
from tools.benchmarks.startup.commands import FIRST_STEP

QUICKSTART = "examples/recipes/quickstart_phase1.yaml"
HEAVY = ("torch", "transformers", "megatron.core", "numpy", "PIL", "matplotlib")
LIGHT = {  # what is told without a model; words after the command -> code it ends with
    ("train", "--help"): 0,
    ("config",): 0,
    ("config", "data.packing"): 0,
    ("convert", "inspect", "no/such/directory"): 1,
    ("train", QUICKSTART, "data.pakcing=true"): 1,
}
LOG = """\
import time: self [us] | imported package
import time:       100 |        100 |     numpy.core
import time:       200 |        300 |   numpy
import time:        40 |         40 |     torch._C
import time:      1000 |       1040 |   torch
import time:         7 |       1347 | megatron_vlm.data
import time:         5 |          5 |   megatron.core
import time:         2 |          7 | script_module
"""


def imported(code: int, *words: str) -> set[str]:
    """The modules that an interpreter imports until it ends with that code."""
    line = [sys.executable, "-X", "importtime", "-P", *words]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    return {module.name for module in import_times.read_log(done.stderr)}


@pytest.mark.parametrize("words", LIGHT)
def test_what_needs_no_model_imports_nothing_that_makes_one(words: tuple[str, ...]) -> None:
    found = imported(LIGHT[words], "-m", "megatron_vlm", *words)
    assert "megatron_vlm.cli.main" in found
    assert not sorted(found.intersection(HEAVY))


def folder_of(folder: Path, settings: dict[str, object], *names: str) -> Path:
    """A model directory whose tensors have two elements each."""
    places = {n: {"dtype": "BF16", "shape": [2], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    header = json.dumps(places).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * len(names)))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


TOWER_NAME = "vision_tower.vision_model.embeddings.class_embedding"
FOLDERS = {
    "llava-hf": (
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model"},
        },
        ("language_model.model.norm.weight", TOWER_NAME, "multi_modal_projector.linear_1.bias"),
    ),
    "llava": (
        {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        ("model.norm.weight", f"model.vision_tower.{TOWER_NAME}", "model.mm_projector.0.bias"),
    ),
    "transformers": ({"model_type": "clip_vision_model"}, ("vision_model.embeddings.class_embedding",)),
}


@pytest.mark.parametrize("format", FOLDERS)
def test_a_directory_of_somebody_else_is_inspected_without_them(tmp_path: Path, format: str) -> None:
    settings, names = FOLDERS[format]
    words = ("-P", "-m", "megatron_vlm", "convert", "inspect", str(folder_of(tmp_path / "model", settings, *names)))
    line = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"format {format}, " in done.stdout and f" {2 * len(names)} parameters" in done.stdout
    assert not sorted({module.name for module in import_times.read_log(done.stderr)}.intersection(HEAVY))


def test_what_a_ranks_children_need_is_imported_before_the_device_is_prepared() -> None:
    """So that the rank can be forked then: none of megatron-core, whose import goes with the device, and no thread."""
    told = "from megatron_vlm.cli.train import CHILDREN_NEED; from megatron_vlm.runtime import fork_server as server; "
    told += "threads = server._threads_of_numpy(); [__import__(name) for name in CHILDREN_NEED]; "
    told += "assert server.obstacle(threads) is None, server.obstacle(threads)"
    found = imported(0, "-c", told)
    assert {"torch", "transformers", "megatron_vlm.data.fetch.loader", "megatron_vlm.checkpoint.writing"} <= found
    assert not sorted(found.intersection({"megatron.core", "torch._dynamo", "megatron_vlm.models.vlm"}))


def test_what_makes_one_is_seen() -> None:
    """The wrong variant."""
    assert {"torch", "numpy"} <= imported(0, "-c", "import megatron_vlm.models.merge").intersection(HEAVY)


def test_an_import_log_is_read() -> None:
    modules = {one.name: one for one in import_times.read_log(LOG)}
    assert modules["torch"].self_seconds == pytest.approx(1e-3)
    assert modules["torch"].cumulative_seconds == pytest.approx(1.04e-3)
    assert modules["torch._C"].importer == modules["numpy"].importer == "megatron_vlm.data"
    assert modules["megatron.core"].importer == modules["megatron_vlm.data"].importer == import_times.SCRIPT
    found = import_times.summary(LOG, 2)
    assert found["modules"] == 7 and found["seconds"] == pytest.approx(1354e-6)
    assert [(one["package"], one["importer"]) for one in found["heaviest"]] == [
        ("torch", "megatron_vlm.data"),
        ("numpy", "megatron_vlm.data"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_ratios_hold(tmp_path: Path) -> None:
    line = [sys.executable, "tools/bench.py", "startup", "--rounds", "3", "--json", str(tmp_path / "startup.json")]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads((tmp_path / "startup.json").read_text())
    assert FIRST_STEP in found["ratio"] and found["imports"].keys() <= found["cpu_seconds"].keys()
    over = {name: ratio for name, ratio in found["ratio"].items() if ratio > found["limits"][name]}
    assert not over
