"""Training speed of the ways to make rows (`data.packing`), and of transformers, on the same samples.

Sizes are those of tools/benchmarks/media/draws.py, texts scaled to the recipe's rows, as one tower sees them, which
gives every image, tile and frame the same number of tokens. A step trains all samples: laid into as few rows as they
need (`samples`), in as many full rows as an epoch of them has (`rows`), or a row each, padded to the longest of its
micro-batch (`off`, and transformers). Sides take turns as in `throughput`, and unless their losses agree nothing is
reported: what is learnt does not depend on packing.

What padding alone explains is the ratio of the rows' tokens, padding included. Attention's work grows with the square
of a row, so packed rows of isolated samples can gain more than that.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from megatron_vlm.config import load_config
from megatron_vlm.config.loading import config_from_tree
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

from ..report import Measured
from .sides import TRANSFORMERS, SideRequest, merge
from .throughput import measure

SAMPLES, ROWS, OFF = "samples", "rows", "off"
ANSWERS = 0.5  # of the words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    parser.add_argument("recipe", help="a YAML recipe, see tools/benchmarks/recipes/bench_packing.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--samples", type=whole_number(1), default=32, metavar="N", help="of a step (default 32)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the draw (default 0)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, metavar="N", help="per side (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures and tells. Raises ConfigError on several ranks."""
    from .. import report

    if launch.world_size > 1:
        raise ConfigError(f"packing is measured on one rank, found {launch.world_size}")
    config = load_config(arguments.recipe, arguments.overrides)
    measured = measure(requests(config, arguments, launch), arguments.rounds, warm_up_steps=1)
    speeds = {name: side.facts.tokens / seconds(side) for name, side in measured.items()}
    rows = {name: side.facts.row_tokens for name, side in measured.items()}
    result: dict[str, Any] = report.header("packing", next(iter(measured.values())).facts.device) | {
        "recipe": arguments.recipe,
        "config": config.model_dump(mode="json"),
        "samples": arguments.samples,
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "sides": {name: dataclasses.asdict(side) for name, side in measured.items()},
        "tokens_per_second": speeds,
        "ratio": {
            "explained by padding": rows[OFF] / rows[SAMPLES],
            f"{SAMPLES} / {OFF}": speeds[SAMPLES] / speeds[OFF],
            **{f"{side} / {TRANSFORMERS}": speeds[side] / speeds[TRANSFORMERS] for side in (SAMPLES, ROWS, OFF)},
            "rows' tokens / samples' tokens": rows[SAMPLES] / measured[SAMPLES].facts.tokens,
        },
    }
    lines = table(result)
    print("\n".join(lines))
    heading = f"\n### {Path(arguments.recipe).stem}\n\n{report.origin(result)}; {arguments.rounds} rounds.\n"
    report.keep(result, "\n".join([heading, f"    {result['command']}\n", *lines, ""]), arguments)


def requests(config: Config, arguments: argparse.Namespace, launch: Launch) -> list[SideRequest]:
    """The four sides. Raises ConfigError where the samples do not make whole micro-batches."""
    import numpy as np

    from megatron_vlm.data.plan.packing import PackedPlan
    from megatron_vlm.models.vision.survey import survey_tower

    from ..media.draws import FEWEST_TEXT_TOKENS, SEQUENCE_LENGTH, draw
    from .synthetic import SampleSize

    per_image, length = (
        survey_tower(config.model.vision, config.model.projector).media_spec.tokens_per_image,
        config.training.sequence_length,
    )
    sizes = []
    for sample in draw(arguments.seed, arguments.samples):
        text = max(FEWEST_TEXT_TOKENS, round(sample.text_tokens * length / SEQUENCE_LENGTH))
        images = min(len(sample.media), (length - text) // per_image)
        sizes.append(SampleSize(text + images * per_image, images))
    tokens = np.array([size.tokens for size in sizes])
    num_rows = PackedPlan(tokens, config.runtime.seed, 1, length, 1).num_rows
    num_steps = 1 + arguments.rounds + 1

    def side(name: str, packing: str, batch: int, micro_batch: int) -> SideRequest:
        training = {"global_batch_size": batch, "micro_batch_size": micro_batch}
        changes = {"data": {"packing": packing}, "training": training}
        changed = config_from_tree(merge(config.model_dump(), changes), f"the recipe, {name}")
        return SideRequest(name, changed, launch, 1, num_steps, ANSWERS, tuple(sizes))

    padded = arguments.samples, config.training.micro_batch_size
    if padded[0] % padded[1]:
        raise ConfigError(f"--samples: found {padded[0]}, needs a multiple of training.micro_batch_size {padded[1]}")
    return [
        side(SAMPLES, "samples", *padded),
        side(ROWS, "rows", num_rows, 1),
        side(OFF, "off", *padded),
        side(TRANSFORMERS, "off", *padded),
    ]


def seconds(side: Measured) -> float:
    """Time of a step: the median of the rounds."""
    from statistics import median

    return median(one.seconds for one in side.rounds)


def table(result: dict[str, Any]) -> list[str]:
    """A table in Markdown."""
    lines = [
        "| side | tokens of its rows | padding | s/step (min..max) | real tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, side in result["sides"].items():
        facts, times = side["facts"], [one["seconds"] for one in side["rounds"]]
        padding = 1 - facts["tokens"] / facts["row_tokens"]
        middle = facts["tokens"] / result["tokens_per_second"][name]
        spread = f"{middle:.2f} ({min(times):.2f}..{max(times):.2f})"
        speed = result["tokens_per_second"][name]
        lines.append(f"| {name} | {facts['row_tokens']:,.0f} | {padding:.1%} | {spread} | {speed:,.0f} |")
    ratios = result["ratio"]
    share = ratios[f"{SAMPLES} / {OFF}"] / ratios["explained by padding"]
    return [
        *lines,
        "",
        f"Ratios of real tokens/s: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}; "
        f"{SAMPLES} / {OFF} is {share:.0%} of what padding alone explains.",
    ]
