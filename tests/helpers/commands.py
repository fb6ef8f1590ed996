"""Whether a command that a document shows would be taken: its tool exists, has its options, its recipe and overrides
are valid. Nothing is trained."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from megatron_vlm.cli.commands import COMMANDS, PROGRAM
from megatron_vlm.config import load_config
from megatron_vlm.config.schema.tree import keys_and_sections
from megatron_vlm.errors import ConfigError
from tests.helpers.ranks.processes import ROOT, environment

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
    first = next((number for number, word in enumerate(words) if _starts_tool(word)), None)
    if first is None:
        return [f"{command!r} names no tool"]
    found = [f"{words[0]} has no {w}" for w in words[:first] if w.startswith("--") and w not in TORCHRUN_OPTIONS]
    if words[first].endswith((".py", ".sh", ".sbatch")):
        return found + _script_faults(words[first], words[first + 1 :])
    return found + _command_faults(words[first + 1 :])


def _starts_tool(word: str) -> bool:
    """Whether a word is a script, or the installed command, also as the module that `-m` runs."""
    return word.endswith((".py", ".sh", ".sbatch")) or Path(word).name in (PROGRAM, "megatron_vlm")


def _script_faults(script: str, arguments: list[str]) -> list[str]:
    path = ROOT / script.removeprefix("/opt/megatron_vlm/")
    if not path.is_file():
        return [f"{script} does not exist"]
    if path.suffix != ".py":
        return _recipe_faults(arguments)
    return _argument_faults(path.name, (str(path),), arguments)


def _command_faults(words: list[str]) -> list[str]:
    """Of `megatron-vlm` with these words behind it."""
    if not words or words[0].startswith("--"):
        known = _help("-m", "megatron_vlm")
        return [f"{PROGRAM} has no {word}" for word in words if not re.search(rf"(?<!\S){word}\b", known)]
    if words[0] not in COMMANDS:
        return [f"{PROGRAM} has no {words[0]}"]
    return _argument_faults(f"{PROGRAM} {words[0]}", ("-m", "megatron_vlm", words[0]), words[1:])


def _argument_faults(name: str, start: tuple[str, ...], arguments: list[str]) -> list[str]:
    """Of what Python runs by the words `start`, called `name`; of what it is to launch, too."""
    if name in ("launch.py", f"{PROGRAM} launch") and "--" in arguments:
        cut = arguments.index("--")
        launched = arguments[cut + 1 :]
        own = [PROGRAM] if "--ranks" in arguments and launched[0] in COMMANDS else []
        return _unknown_options(name, start, arguments[:cut]) + faults(shlex.join([*own, *launched]))
    return _unknown_options(name, start, arguments) + _recipe_faults(arguments)


def key_fault(key: str) -> str | None:
    """A dotted key of the recipe that does not exist."""
    return None if key in set(keys_and_sections()) else f"{key} is no key of the recipe"


def _unknown_options(name: str, start: tuple[str, ...], arguments: list[str]) -> list[str]:
    first = arguments[0] if arguments and arguments[0].isalpha() else ""
    is_subcommand = first and re.search(rf"\n    {first}\s", _help(*start))  # a long one stands alone
    known = _help(*start, *([first] if is_subcommand else []))
    options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)}
    return [f"{name} has no {option}" for option in sorted(options) if not re.search(rf"(?<!\S){option}\b", known)]


@cache
def _help(*start: str) -> str:
    done = subprocess.run(
        [sys.executable, *start, "--help"],
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
