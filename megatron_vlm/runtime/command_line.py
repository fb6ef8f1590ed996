"""The start of every tool: its place in the job, its arguments, and the one line that bad ones cost.

argparse alone would print usage and error on every rank, before anything makes the ranks speak with one voice, so the
arguments are read inside `fail_together`. torch is not imported: help comes at once.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from megatron_vlm.errors import ConfigError, ParallelError, one_line
from megatron_vlm.runtime.failure import fail_together
from megatron_vlm.runtime.garbage import spare_imports
from megatron_vlm.runtime.launch import Launch, read_launch, spare_children_the_working_directory
from megatron_vlm.runtime.pipes import silent_without_reader

CHOICES = ("template", "template_arguments", "dtype", "format_options", "extensions")  # options that `load` takes


@contextmanager
def one_voice() -> Iterator[Launch]:
    """The main part of a command runs inside, which is given its place among the ranks; what a user can fix ends the
    whole job with one line.

    Raises:
        SystemExit: code 1, where the process failed; of `pipes`, where nobody reads what it says.
    """
    spare_imports()
    spare_children_the_working_directory()
    with silent_without_reader():
        try:
            launch = read_launch()
        except ParallelError as error:
            sys.stderr.write(f"error: {one_line(error)}\n")
            raise SystemExit(1) from error
        with fail_together(launch, debug="--debug" in sys.argv):
            yield launch


class CommandLine(argparse.ArgumentParser):
    """A tool's arguments.

    Args:
        description: the tool's docstring, printed as it is.
        options: argparse's own, which it passes to the parsers of a tool's subcommands.
    """

    def __init__(self, description: str | None, **options: Any) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")

    def add_layout(self) -> None:
        """Adds the options by which a model is loaded: device, ranks, dtype, template, format options."""
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        axes = {"tensor": "tensor-parallel ranks", "pipeline": "pipeline stages"}
        axes |= {"ulysses": "ranks that share a prompt by heads", "ring": "ranks that share a prompt by keys"}
        for name, what in axes.items():
            self.add_argument(f"--{name}", type=whole_number(1), default=1, metavar="N", help=f"{what} (default 1)")
        self.add_argument("--template", metavar="NAME", help="conversation template (default: the model's own)")
        self.add_argument(
            "--template-argument",
            dest="template_arguments",
            action=_Mapping,
            type=_name_and_value,
            metavar="NAME=VALUE",
            help="variable of the tokenizer's chat template, such as enable_thinking=false (default: as trained)",
        )
        self.add_argument(
            "--dtype",
            choices=("fp32", "bf16"),
            help="of the weights (default: as trained or stored; fp16 as bf16 on GPUs)",
        )
        self.add_format_options()
        self.add_extensions()

    def add_extensions(self) -> None:
        """Whose code a checkpoint may need: its own word imports nothing."""
        self.add_argument(
            "--extensions",
            type=_module_names,
            default=(),
            metavar="NAME[,NAME]",
            help="modules of yours to import; those that a checkpoint was trained with must be named here",
        )

    def add_format_options(self) -> None:
        """Adds the option for what a directory of another system leaves open; its format knows the keys."""
        self.add_argument(
            "--format-option",
            dest="format_options",
            action=_Mapping,
            type=_name_and_value,
            metavar="KEY=VALUE",
            help="what a directory of another system leaves open; docs/formats.md lists the keys of each format",
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError where argparse would print its usage."""
        raise ConfigError(f"{message} ({self.prog} --help shows what there is)")

    @contextmanager
    def run(self) -> Iterator[tuple[argparse.Namespace, Launch]]:
        """The tool's main part runs inside `one_voice`, which raises SystemExit; it is given the arguments too."""
        with one_voice() as launch:
            yield self._read_arguments(), launch

    def _read_arguments(self) -> argparse.Namespace:
        """Options may stand anywhere: `RECIPE --debug section.key=value`; argparse alone would refuse the override."""
        takes_all_that_follows = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        return self.parse_args() if takes_all_that_follows else self.parse_intermixed_args()


def _module_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise argparse.ArgumentTypeError(f"found {text!r}, needs names of modules: my_package.my_module,other")
    return names


class _Mapping(argparse.Action):
    """Gathers pairs of an option given several times."""

    def __call__(self, _: Any, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        name, value = values
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), name: value})


def _name_and_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is some, else a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, needs NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def whole_number(minimum: int) -> Callable[[str], int]:
    """The `type` of an option that takes integers from `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"found {text!r}, needs an integer of at least {minimum}")
        return int(text)

    return parse
