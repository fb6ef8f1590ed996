"""tools/convert.py as a process: there and back, what it says of directories, and one line for what is wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.models.foreign_models import llava, llava_hf, projector_alone, tree
from tests.helpers.ranks.processes import ROOT, environment

LIMIT_SECONDS = 300


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS)


def test_there_and_back(tmp_path):
    source = llava_hf(tmp_path / "source")
    done = convert("import", source, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{source} (llava-hf) -> {tmp_path}/ours/step_0000000\n" and not done.stderr
    done = convert("export", tmp_path / "ours", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/ours -> {tmp_path}/back (llava-hf)\n"
    assert tree(tmp_path / "back") == tree(source)


def test_a_damaged_directory_costs_one_line_and_leaves_nothing(tmp_path):
    source = llava(tmp_path / "source")
    (source / "model-00002-of-00002.safetensors").unlink()
    before = tree(tmp_path)
    done = convert("import", source, tmp_path / "ours")
    shard = source / "model-00002-of-00002.safetensors"
    assert done.returncode != 0 and done.stderr == f"error: {shard}: this shard is missing\n" and not done.stdout
    assert tree(tmp_path) == before


def test_a_mistyped_source_leaves_no_directory(tmp_path):
    done = convert("import", tmp_path / "nosuch", tmp_path / "a" / "b")
    assert done.returncode != 0 and done.stderr == f"error: {tmp_path}/nosuch: no such directory\n"
    assert not list(tmp_path.iterdir())


def hears_interrupts() -> None:
    """What a shell starts in the background does not, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_an_interrupted_import_leaves_nothing(tmp_path):
    """Before and after torch is imported."""
    source = llava_hf(tmp_path / "source")
    for seconds in (0.5, 3.0):
        command = [sys.executable, str(ROOT / "tools" / "convert.py"), "import", source, tmp_path / "ours"]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, preexec_fn=hears_interrupts)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode != 0 and not (tmp_path / "ours").exists()


@pytest.mark.slow
def test_what_a_directory_is_is_said(tmp_path):
    llava_hf(tmp_path / "hf")
    llava(tmp_path / "original", tower="reference")
    convert("import", tmp_path / "hf", tmp_path / "ours")
    said = {name: convert("inspect", tmp_path / name).stdout for name in ("hf", "original", "ours", "original_tower")}
    assert "format llava-hf, family llava, 263,456 parameters" in said["hf"]
    assert f"the tower's weights are in {tmp_path}/original_tower" in said["original"]
    assert "model-00002-of-00002.safetensors" in said["original"]
    assert "format megatron_vlm, family llava, 263,456 parameters" in said["ours"]
    assert "imported from llava-hf" in said["ours"] and "bfloat16" in said["ours"]
    assert "format transformers, family clip_vision_model, 64,992 parameters" in said["original_tower"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("inspect", "EMPTY"), "found no weights"),
        (("export", "EMPTY", "OUT"), "is not a checkpoint"),
        (("import", "EMPTY", "OUT"), "no format recognises it"),
        (("import", "EMPTY", "OUT", "--format", "lava"), "did you mean 'llava'?"),
        (("import", "EMPTY"), "the following arguments are required: destination"),
        (
            ("import", "EMPTY", "OUT", "--seed", "3", "--select-layer", "-1"),
            "--select-layer, --seed: found without --tower",
        ),
        (("import", "EMPTY", "OUT", "--tower", "EMPTY", "--format", "llava"), "--format: found llava with --tower"),
        (("import", "EMPTY", "OUT", "--tower", "EMPTY", "--base", "EMPTY"), "--base: found for a new pair"),
    ],
)
def test_bad_arguments_cost_one_line(tmp_path, arguments, line):
    (tmp_path / "EMPTY").mkdir()
    given = [str(tmp_path / part) if part.isupper() else part for part in arguments]
    done = convert(*given)
    assert done.returncode != 0 and line in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"]


@pytest.mark.slow
def test_named_parts_are_taken_from_where_the_command_says(tmp_path):
    """A tower and a language model that the directories name by hub ids nobody can fetch."""
    whole, alone = llava(tmp_path / "whole", tower="reference"), projector_alone(tmp_path / "alone")
    for folder in (whole, alone):
        config = json.loads((folder / "config.json").read_text())
        absent = {"mm_vision_tower": "nobody/tower", "_name_or_path": "nobody/model"}
        (folder / "config.json").write_text(json.dumps({**config, **absent}))
    done = convert("import", whole, tmp_path / "lost")
    assert done.returncode != 0 and "nobody/tower: neither a directory nor a hub id" in done.stderr
    said = convert("inspect", whole)
    assert "format llava, family llava" in said.stdout and "the tower is not here: mm_vision_tower is nobody/tower" in (
        said.stdout
    )
    done = convert("import", whole, tmp_path / "ours", "--tower", tmp_path / "whole_tower", "--seed", "3")
    assert done.returncode != 0 and "--seed: found for" in done.stderr
    done = convert("import", whole, tmp_path / "ours", "--tower", tmp_path / "whole_tower")
    assert done.returncode == 0, done.stderr
    done = convert("export", tmp_path / "ours", tmp_path / "back")
    assert done.returncode == 0 and tree(tmp_path / "back") == tree(whole), done.stderr
    parts = "--tower", tmp_path / "alone_whole_tower", "--base", tmp_path / "alone_base"
    done = convert("import", alone, tmp_path / "phase1", *parts)
    assert done.returncode == 0, done.stderr
    assert "(llava)" in convert("export", tmp_path / "phase1", tmp_path / "phase1_back").stdout
    done = convert("import", llava_hf(tmp_path / "hf"), tmp_path / "more", "--base", tmp_path / "alone_base")
    assert done.returncode != 0 and "a directory of llava-hf holds all its parts" in done.stderr
