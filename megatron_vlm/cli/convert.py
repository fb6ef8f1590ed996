"""Moves weights between formats.

megatron-vlm convert import SOURCE DESTINATION                      a directory of LLaVA -> a checkpoint of ours
megatron-vlm convert import LANGUAGE DESTINATION --tower TOWER      the two halves, with a new projector
megatron-vlm convert import SOURCE DESTINATION --tower TOWER --base LANGUAGE   parts that a directory of LLaVA names
megatron-vlm convert import SOURCE DESTINATION --format-option downsample_order=row   what it leaves open
megatron-vlm convert export CHECKPOINT DESTINATION [--format llava-hf] [--dtype bf16]
megatron-vlm convert verify A B [--media a.png ...] [--prompt "..."]  do they compute the same?
megatron-vlm convert inspect DIRECTORY                              what is it?

The formats are described in docs/formats.md. Each command prints its own --help.
"""

import argparse
import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.errors import shown
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.waiting import told_if_slow

if TYPE_CHECKING:  # what a command needs is imported when it runs
    from megatron_vlm.conversion.formats import ForeignModel
    from megatron_vlm.runtime.progress import Progress

PAIR_OPTIONS = ("projector", "select_layer", "select_feature", "seed")


def main() -> None:
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments) in {
        "import": ("a model directory -> a checkpoint of ours", _add_import),
        "export": ("a checkpoint of ours -> a model directory", _add_export),
        "verify": ("compare what two models compute", _add_verify),
        "inspect": ("say what a directory holds: format, family, parts, dtypes, shards", _add_inspect),
    }.items():
        add_arguments(commands.add_parser(name, description=summary, help=summary))
    with parser.run() as (arguments, _):
        arguments.execute(arguments)


def _add_import(parser: CommandLine) -> None:
    parser.add_argument("source", help="a directory or hub id (org/name@revision); of a new pair, the language model's")
    parser.add_argument("destination", type=Path, help="a directory of checkpoints to be")
    parser.add_argument("--format", help="default: the one that recognises the directory")
    parser.add_argument(
        "--tower",
        help="vision tower's directory or hub id: where the one lies that a directory of LLaVA names, or, where SOURCE "
        "is a language model, the other half of a new pair",
    )
    parser.add_argument("--base", help="language model's directory or hub id, for an mm_projector.bin alone")
    parser.add_format_options()
    pair = parser.add_argument_group("a new pair")
    pair.add_argument("--projector", help="registered type (default mlp2x_gelu)")
    pair.add_argument("--select-layer", type=int, help="hidden state of the tower (default -2)")
    pair.add_argument("--select-feature", choices=("patch", "cls_patch"), help="default patch")
    pair.add_argument("--seed", type=whole_number(0), help="of the projector's weights (default 42)")
    parser.set_defaults(execute=_import)


def _add_export(parser: CommandLine) -> None:
    parser.add_argument("checkpoint", help="a checkpoint directory, or a directory of checkpoints (its latest)")
    parser.add_argument("destination", type=Path, help="a directory that does not exist, or is empty")
    parser.add_argument("--format", help="default: the one it was imported from, else llava-hf")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: that of the origin, else as stored")
    parser.add_extensions()
    parser.set_defaults(execute=_export)


def _add_verify(parser: CommandLine) -> None:
    parser.add_argument("a", help="a model directory or a checkpoint")
    parser.add_argument("b", help="another")
    parser.add_argument("--media", nargs="+", default=[], type=Path, metavar="FILE", help="images, in order")
    parser.add_argument(
        "--prompt",
        default="",
        help="what both are asked; <image> marks an image (default: random tokens)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_format_options()
    parser.add_extensions()
    parser.set_defaults(execute=_verify)


def _add_inspect(parser: CommandLine) -> None:
    parser.add_argument("directory", help="a model directory of any format, or a checkpoint")
    parser.set_defaults(execute=_inspect)


def _import(arguments: argparse.Namespace) -> None:
    _prepare()
    from megatron_vlm.conversion.transfer.destination import refuse_taken_checkpoints

    refuse_taken_checkpoints(arguments.destination)  # before anything is fetched
    with told_if_slow(f"opening {arguments.source}"):
        from megatron_vlm.conversion.transfer.importing import import_model, size_bytes

        foreign = _open(arguments)
    with _Bytes() as written:
        written.show(f"importing {arguments.source}", size_bytes(foreign))
        checkpoint = import_model(foreign, arguments.destination, written.advance)
    print(shown(f"{arguments.source} ({foreign.format}) -> {checkpoint}"))


def _open(arguments: argparse.Namespace) -> "ForeignModel":
    """The model to import. Raises ConfigError for options that it would pass over."""
    from megatron_vlm.conversion.formats import ExternalParts, ModelFolder, open_foreign, open_pair
    from megatron_vlm.conversion.weights.sources import resolve_folder
    from megatron_vlm.errors import ConfigError

    given = {name: value for name in PAIR_OPTIONS if (value := getattr(arguments, name)) is not None}
    options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if arguments.tower is None:
        if given:
            raise ConfigError(f"{options}: found without --tower; a new pair of language model and tower needs both")
        external = ExternalParts(base=arguments.base, options=arguments.format_options or {})
        return open_foreign(arguments.source, arguments.format, external)
    if arguments.format is not None:
        raise ConfigError(
            f"--format: found {arguments.format} with --tower, which names the format itself; leave one of them out"
        )
    found = ModelFolder.of(resolve_folder(arguments.source))
    if found.format is None:
        if arguments.base is not None:
            raise ConfigError("--base: found for a new pair, whose language model is SOURCE; leave it out")
        if arguments.format_options:
            raise ConfigError("--format-option: found for a new pair, which leaves nothing open; leave it out")
        return open_pair(arguments.source, arguments.tower, **given, found=found)
    if given:
        raise ConfigError(
            f"{options}: found for {arguments.source}, which names these itself; needs a language model as SOURCE"
        )
    external = ExternalParts(arguments.tower, arguments.base, arguments.format_options or {})
    return open_foreign(arguments.source, external=external, found=found)


def _export(arguments: argparse.Namespace) -> None:
    _prepare()
    from megatron_vlm.config.extensions import import_extensions

    import_extensions(arguments.extensions)
    with told_if_slow(f"opening {arguments.checkpoint}"):
        from megatron_vlm.conversion.transfer.exporting import plan_export

        plan = plan_export(arguments.checkpoint, arguments.format, arguments.dtype)
    with _Bytes() as written:
        written.show(f"exporting {arguments.checkpoint}", plan.size_bytes)
        plan.write(arguments.destination, written.advance)
    print(shown(f"{arguments.checkpoint} -> {arguments.destination} ({plan.format})"))


def _verify(arguments: argparse.Namespace) -> None:
    from megatron_vlm.config.extensions import import_extensions
    from megatron_vlm.runtime.device import prepare

    prepare(arguments.device)  # before what an extension imports
    import_extensions(arguments.extensions)
    asked = arguments.media, arguments.prompt, arguments.device, arguments.format_options
    with told_if_slow(f"comparing {arguments.a} and {arguments.b}"):
        from megatron_vlm.conversion.verify.comparing import compare

        comparison = compare(arguments.a, arguments.b, *asked)
    print(shown(comparison))
    if not comparison.agrees:
        raise SystemExit(1)


def _inspect(arguments: argparse.Namespace) -> None:
    _prepare()
    from megatron_vlm.conversion.transfer.inspection import inspect

    print(shown(inspect(arguments.directory)))


def _prepare() -> None:
    """Weights are moved by the CPU; what is printed is the result."""
    from megatron_vlm.runtime.device import hide_cuda
    from megatron_vlm.runtime.logging import get_logger

    hide_cuda()
    get_logger("megatron_vlm").setLevel(logging.WARNING)


class _Bytes:
    """Counts bytes written, told of by several threads; `show` makes it a progress bar, where stdout is a terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._lock, self._done, self._total = threading.Lock(), 0, 0

    def show(self, description: str, size_bytes: int) -> None:
        from megatron_vlm.runtime.progress import Progress

        self._total = size_bytes // 10**6
        self._bar = Progress(description, self._total, enabled=sys.stdout.isatty())

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._bar is not None:
                self._bar.update(min(self._done // 10**6, self._total), "MB")

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    main()
