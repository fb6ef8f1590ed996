"""The installed command: `megatron-vlm COMMAND`, which `python -m megatron_vlm` and `torchrun -m megatron_vlm` are too.

`megatron-vlm train RECIPE.yaml` imports `megatron_vlm.cli.train` and calls its `main`, which finds in `sys.argv` what
it would find as a script: a name (`megatron-vlm train`) and its arguments. So help and a mistyped command import
nothing that takes time, and a command pays for what it needs alone.
"""

import importlib
import sys

from megatron_vlm import __version__
from megatron_vlm.cli.commands import COMMANDS, PROGRAM
from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.command_line import one_voice
from megatron_vlm.runtime.pipes import silent_without_reader


def main() -> None:
    """Runs the command that `sys.argv` names.

    Raises:
        SystemExit: code 1 for a command that does not exist, which costs one line on stderr.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"{PROGRAM} {name}"]
        importlib.import_module(f"megatron_vlm.cli.{name.replace('-', '_')}").main()
    elif name in ("-h", "--help", "--version"):
        with silent_without_reader():
            print(f"{PROGRAM} {__version__}" if name == "--version" else _help())
    else:
        with one_voice():
            hint = did_you_mean(name, COMMANDS, f"needs one of {', '.join(COMMANDS)}")
            raise ConfigError(f"command: found {name!r}, {hint} ({PROGRAM} --help shows what there is)")


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return f"""\
usage: {PROGRAM} COMMAND [ARGUMENT ...]

Trains vision-language models in parallel, on GPU clusters and on a plain CPU, and asks them.

commands:
{commands}

options:
  -h, --help  show this help; after a COMMAND, that command's
  --version   show the version

On several ranks of one machine: {PROGRAM} launch --local --ranks N -- COMMAND [ARGUMENT ...]
On several nodes, on each: torchrun [options] -m megatron_vlm COMMAND [ARGUMENT ...]"""
