"""The tables on the terminal, and the files."""

import argparse
import json
from pathlib import Path

from rich.table import Table

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError, one_line, shown
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.planner.layout import LayoutView, view_layout
from megatron_vlm.runtime.logging import stdout_console

from .page import page
from .svg import count, si, size

PIPED_WIDTH = 120  # columns where there is no terminal


def show(name: str, config: Config, model: ModelDescription, arguments: argparse.Namespace) -> None:
    """Prints the layout of a resolved recipe on `arguments.world_size` ranks and writes what was asked for.

    Raises:
        ConfigError: a file cannot be written.
        DataError: its data are there and cannot be used.
    """
    view = view_layout(name, config, model, arguments.world_size)
    if arguments.html:
        write(arguments.html, page(view))
    if arguments.json:
        write(arguments.json, json.dumps(view.as_json(), indent=1) + "\n")
    console = stdout_console(PIPED_WIDTH)
    for table in (held(view), needed(view), sent(view), *([attended(view)] if view.sizes.ring > 1 else [])):
        console.print(table)
    console.print(shown(step_line(view)), style="dim", soft_wrap=True)


def write(path: Path, contents: str) -> None:
    """Whole or not at all. Raises ConfigError."""
    try:
        beside = path.with_name(f".{path.name}.partial")
        beside.unlink(missing_ok=True)  # a named pipe would be waited for
        beside.write_text(contents, encoding="utf-8")
        beside.replace(path)
    except (OSError, ValueError) as error:  # ValueError: an empty name
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ConfigError(f"{path}: cannot be written: {reason}, needs a file in a folder that is there") from error


def held(view: LayoutView) -> Table:
    """Rank, place, layers, tokens, images."""
    shares = view.sizes.context > 1
    table = _table(f"{view.name} on {view.sizes.world} ranks", "replica", "stage", *["ring", "Ulysses"] * shares,
                   "tensor", "layers", "parameters", "tokens", "images")  # fmt: skip
    for one in view.ranks:
        ends = ["embedding"] * any(c.first for c in one.chunks) + ["head"] * any(c.last for c in one.chunks)
        tokens = ", ".join(f"{first:,}\u2013{end - 1:,}" for first, end in one.tokens)
        layers = " + ".join([one.layers, *ends])
        context = [str(one.at.ring), str(one.at.ulysses)] * shares
        table.add_row(str(one.rank), str(one.at.data), str(one.at.pipeline), *context, str(one.at.tensor), layers,
                      count(one.num_parameters), tokens, str(one.num_images))  # fmt: skip
    return table


def needed(view: LayoutView) -> Table:
    """Memory by component."""
    title = f"memory per rank, activations as attention's backend {view.attention!r} keeps them"
    table = _table(title, "parameters", "gradients", "optimizer", "activations", "loss head", "features",
                   "encoder", "at its fullest")  # fmt: skip
    for one in view.ranks:
        memory = one.memory
        both = zip(vars(memory.language).values(), vars(memory.vision).values(), strict=True)
        encoder = max(memory.vision_activations, memory.encoding)
        numbers = [*map(sum, both), memory.activations, memory.loss_head, memory.features, encoder, memory.peak]
        table.add_row(str(one.rank), *map(size, numbers))
    return table


def sent(view: LayoutView) -> Table:
    """Bytes by kind."""
    table = _table("sent per rank and step", "features", "gradients back", "tensor", "attention", "pipeline",
                   "language DP", "encoder DP", "together")  # fmt: skip
    for one in view.ranks:
        table.add_row(str(one.rank), *map(size, [*vars(one.traffic).values(), one.traffic.total]))
    return table


def attended(view: LayoutView) -> Table:
    """Query-key pairs of the shown row, by ring rank and step."""
    pairs = view.shown.pairs
    mean = sum(map(sum, pairs)) / len(pairs)
    steps = [f"step {number}" for number in range(len(pairs))]
    table = _table("query-key pairs of one row", *steps, "together", "over the mean")
    table.columns[0].header = "ring rank"
    for number, of_rank in enumerate(pairs):
        together = sum(of_rank)
        table.add_row(str(number), *(f"{one:,}" for one in (*of_rank, together)), f"{together / mean:.3f}")
    return table


def step_line(view: LayoutView) -> str:
    """The step in one line, and where its rows are from."""
    phases = ", ".join(f"{name.replace('_', ' ')} {si(flops, 'FLOP')}" for name, flops in view.times[0].phases.items())
    return f"replica 0: {phases}; pipeline bubble {view.times[0].bubble:.1%}. Rows: {view.batch.source}."


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=shown(title), title_justify="left", title_style="bold", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    for column in ("rank", *columns):
        table.add_column(column, justify="left" if column == "layers" else "right", no_wrap=column != "layers")
    return table
