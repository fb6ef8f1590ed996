"""Whether a command that a document shows would be taken: its tool exists, has its options, its recipe and overrides
are valid. Nothing is trained."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from megatron_vlm.config import load_config
from megatron_vlm.config.schema.tree import keys_and_sections
from megatron_vlm.errors import ConfigError
from tests.helpers.processes import ROOT, environment

TORCHRUN_OPTIONS = {"--nproc-per-node", "--nnodes", "--standalone", "--node-rank", "--master-addr"}
OVERRIDE = re.compile(r"[a-z_]+(?:\.[a-z_]+)*=.*", re.DOTALL)


def faults(command: str) -> list[str]:
    """What is wrong with it; nothing where it would be taken."""
    words = shlex.split(command.replace("...", ""))
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words:
        return [f"{command!r} is no command"]
    if words[0] == "make":
        targets = (ROOT / "Makefile").read_text()
        return [f"make has no {word}" for word in words[1:] if not re.search(rf"^{word}:", targets, re.MULTILINE)]
    if words[0] == "docker":
        return (
            [] if words[1] in ("build", "run") and (ROOT / "Dockerfile").exists() else [f"{command!r}: no Dockerfile"]
        )
    script = next((number for number, word in enumerate(words) if word.endswith((".py", ".sh", ".sbatch"))), None)
    if script is None:
        return [f"{command!r} names no tool"]
    found = [f"torchrun has no {w}" for w in words[:script] if w.startswith("--") and w not in TORCHRUN_OPTIONS]
    path = ROOT / words[script].removeprefix("/opt/megatron_vlm/")
    if not path.is_file():
        return [*found, f"{words[script]} does not exist"]
    arguments = words[script + 1 :]
    if path.name == "launch.py" and "--" in arguments:
        cut = arguments.index("--")
        return found + _unknown_options(path, arguments[:cut]) + faults(shlex.join(arguments[cut + 1 :]))
    if path.suffix == ".py":
        found += _unknown_options(path, arguments)
    return found + _recipe_faults(arguments)


def key_fault(key: str) -> str | None:
    """A dotted key of the recipe that does not exist."""
    return None if key in set(keys_and_sections()) else f"{key} is no key of the recipe"


def _unknown_options(tool: Path, arguments: list[str]) -> list[str]:
    first = arguments[0] if arguments and arguments[0].isalpha() else ""
    subcommand = first if first and re.search(rf"\n    {first}\s", _help(tool)) else ""  # a long one stands alone
    known = _help(tool, subcommand)
    options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)}
    return [f"{tool.name} has no {option}" for option in sorted(options) if not re.search(rf"(?<!\S){option}\b", known)]


@cache
def _help(tool: Path, *subcommand: str) -> str:
    done = subprocess.run(
        [sys.executable, str(tool), *filter(None, subcommand), "--help"],
        env=environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.replace("[", " ").replace("]", " ").replace(",", " ")


def _recipe_faults(arguments: list[str]) -> list[str]:
    recipe = next((ROOT / word for word in arguments if word.endswith(".yaml")), None)
    overrides = [word for word in arguments if OVERRIDE.fullmatch(word)]
    if recipe is None or recipe.stem.isupper():  # RECIPE.yaml stands for any
        return [fault for word in overrides if (fault := key_fault(word.partition("=")[0]))]
    try:
        load_config(recipe, overrides)
    except ConfigError as error:
        return [str(error)]
    return []
