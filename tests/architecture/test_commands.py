"""Every command that README.md and docs/coming-from.md show would be taken, and every key they name exists."""

import re

import pytest

from tests.architecture.documents import exists, named_paths
from tests.architecture.sources import ROOT
from tests.helpers.commands import faults, key_fault

COMMAND = re.compile(
    r"^(?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?(?:(?:python|torchrun|make|docker|sbatch|megatron-vlm) \S|examples/\S+\.sh\b).*"
)
KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)(?:=\S*|: .*)?")
SECTIONS = {"runtime", "model", "parallel", "data", "precision", "optimizer", "schedule", "training", "checkpoint"} | {
    "evaluation", "logging", "ops",
}  # fmt: skip


def shown_commands(text: str) -> list[str]:
    """Commands in lines indented by four, fences and code spans; a backslash joins lines."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [line[4:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [re.sub(r"\s{2,}\S.*", "", line) for line in lines if COMMAND.match(line)]


def named_keys(text: str) -> set[str]:
    """Dotted keys in code spans that begin with a section of the recipe."""
    spans = re.findall(r"`([^`\n]+)`", text)
    found = {match[1] for span in spans for word in span.split(", ") if (match := KEY.fullmatch(word))}
    return {
        key for key in found if key.split(".")[0] in SECTIONS and key != "model.generate" and not key.endswith(".jsonl")
    }


@pytest.mark.parametrize(
    ("document", "least"),
    [("README.md", 10), ("docs/coming-from.md", 10), ("docs/running.md", 6), ("docs/training.md", 3)],
)
def test_commands_would_be_taken(document: str, least: int) -> None:
    text = re.sub(r"^\| .*? \| ", "", (ROOT / document).read_text(), flags=re.MULTILINE)  # theirs stand on the left
    commands = shown_commands(text)
    assert len(commands) >= least, commands
    wrong = [f"{command}: {fault}" for command in commands for fault in faults(command)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("document", "least"),
    [
        ("README.md", 2),
        ("docs/training.md", 10),
        ("docs/running.md", 2),
        ("docs/design.md", 4),
        ("docs/limitations.md", 4),
        ("CONTRIBUTING.md", 4),
    ],
)
def test_keys_named_exist(document: str, least: int) -> None:
    keys = named_keys((ROOT / document).read_text())
    assert len(keys) >= least, keys
    wrong = [fault for key in sorted(keys) if (fault := key_fault(key))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python tools/none.py --x", "tools/none.py does not exist"),
        ("python tools/train.py RECIPE.yaml --chek-layout", "train.py has no --chek-layout"),
        ("python tools/train.py RECIPE.yaml training.stps=3", "training.stps is no key of the recipe"),
        ("torchrun --nproc 2 tools/train.py RECIPE.yaml", "torchrun has no --nproc"),
        ("python tools/launch.py --nods 2 -- python tools/train.py", "launch.py has no --nods"),
        ("make quickstrt", "make has no quickstrt"),
        (".venv/bin/megatron-vlm trian RECIPE.yaml", "megatron-vlm has no trian"),
        ("megatron-vlm --versoin", "megatron-vlm has no --versoin"),
        ("megatron-vlm train RECIPE.yaml --chek-layout", "megatron-vlm train has no --chek-layout"),
        ("megatron-vlm convert inspect DIRECTORY --deep", "megatron-vlm convert has no --deep"),
        ("torchrun -m megatron_vlm train RECIPE.yaml training.stps=3", "training.stps is no key of the recipe"),
        ("megatron-vlm launch --local --ranks 2 -- trian RECIPE.yaml", "'trian RECIPE.yaml' names no tool"),
        ("megatron-vlm launch --local --ranks 2 -- train RECIPE.yaml --x", "megatron-vlm train has no --x"),
    ],
)
def test_the_rule_can_fail(command: str, fault: str) -> None:
    assert faults(command) == [fault]


@pytest.mark.parametrize(
    "command",
    [
        "megatron-vlm --version",
        "megatron-vlm launch --local --ranks 2 -- train RECIPE.yaml training.steps=3 --check-layout",
        "torchrun --nproc-per-node 2 -m megatron_vlm train RECIPE.yaml",
        "megatron-vlm convert import A B --tower C",
    ],
)
def test_the_rule_can_pass(command: str) -> None:
    assert not faults(command)


def test_a_wrong_value_in_a_shipped_recipe_is_found() -> None:
    command = "python tools/train.py examples/recipes/quickstart_phase1.yaml training.steps=-1"
    assert len(faults(command)) == 1 and "training.steps: found -1" in faults(command)[0]


def test_commands_and_keys_are_found() -> None:
    text = "See `data.path=x`, `megatron_vlm.load` and `python tools/a.py X`.\n\n    make venv   then\n\n    not one\n"
    assert shown_commands(text) == ["make venv", "python tools/a.py X"] and named_keys(text) == {"data.path"}
    assert all(exists(path) for path in named_paths("`README.md`"))
