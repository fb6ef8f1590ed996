"""`megatron-vlm` before it runs a command: help, a name nobody knows, where a command finds its arguments."""

import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm import __version__
from megatron_vlm.cli import main as entry
from megatron_vlm.cli.commands import COMMANDS
from tests.helpers.ranks.processes import ROOT, environment

MODULES = {path.stem for path in (ROOT / "megatron_vlm" / "cli").glob("*.py")} - {"__init__", "main", "commands"}
SEEN = """
import runpy, sys
sys.argv[1:] = sys.argv[2:]
try:
    runpy.run_module("megatron_vlm", run_name="__main__", alter_sys=True)
finally:
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)
"""


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `megatron-vlm` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megatron-vlm", *arguments])
    try:
        entry.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_every_command_is_listed_and_there() -> None:
    assert {name.replace("-", "_") for name in COMMANDS} == MODULES
    assert all(callable(importlib.import_module(f"megatron_vlm.cli.{module}").main) for module in MODULES)


def test_each_script_in_tools_is_a_command() -> None:
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} - {"bench"} <= MODULES


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(monkeypatch, "--help") == ask(monkeypatch) == ask(monkeypatch, "-h") == 0
    told = capsys.readouterr()
    assert told.err == "" and all(told.out.count(f"\n  {name} ") == 3 for name in COMMANDS)
    assert ask(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megatron-vlm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian", "recipe.yaml", "--debg"], "found 'trian', did you mean 'train'?"),
        (["show_layouts"], "found 'show_layouts', did you mean 'show-layout'?"),
        (["bench"], f"found 'bench', needs one of {', '.join(COMMANDS)}"),
        (["--verbose", "train"], "found '--verbose', needs one of"),
    ],
)
def test_a_name_nobody_knows_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ask(monkeypatch, *arguments) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith(f"error: command: {hint}")


def test_a_command_finds_its_own_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        assert ask(patch, "train", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: megatron-vlm train [-h]")


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["trian"], 1), (["train", "--chek"], 1)])
def test_nothing_that_takes_time_is_imported(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SEEN, "program", *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_no_module_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    loaded = [sys.executable, "-c", "import runpy, sys; print(*sys.modules)"]  # by Python itself, before -m's module
    known = subprocess.run(loaded, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True).stdout
    planted = sys.stdlib_module_names - set(known.split()) - set(sys.builtin_module_names)
    assert {"logging", "typing", "argparse"} <= planted
    for name in planted:
        (tmp_path / f"{name}.py").write_text("1 / 0\n")
    clean = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "megatron_vlm", "train", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def processor_seconds(*arguments: str) -> float:
    """What a Python process of these arguments takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(), capture_output=True, timeout=300, check=False
    )
    assert done.returncode == (1 if arguments[-1] == "trian" else 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["trian"], ["train", "--help"], ["launch", "--help"]])
def test_it_answers_in_a_fifth_of_the_time_of_importing_torch_and_transformers(arguments: list[str]) -> None:
    imports = min(processor_seconds("-c", "import torch, transformers") for _ in range(2))
    assert min(processor_seconds("-m", "megatron_vlm", *arguments) for _ in range(2)) <= 0.2 * imports
