"""Balance of the vision encoder's work: measured encoder seconds, slowest rank over the mean.

Batches are drawn as `draws.py` beside this file says: text, single images, several, tiles and video frames, of three
sizes. A small SigLIP tower encodes them on one thread of the CPU, each rank's share in turn, in calls of up to four
images of one size; what counts is processor time, the fastest of some rounds of each call. The share of a rank is
that of the product: its cost a*patches + b*patches^2, a and b measured once by the function that measures them when a
job starts, and its longest-first assignment. Beside it the split that others use: equal numbers of images,
contiguous. The ratio is the slowest rank's time by count over that by cost, on the mean.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

if TYPE_CHECKING:
    from megatron_vlm.models.vision.encoder import VisionEncoder
    from megatron_vlm.parallel.media_plan import MediaCost

PATCH, HIDDEN = 14, 64
TOWER = {
    "model_type": "siglip_vision_model",
    "image_size": 27 * PATCH,
    "patch_size": PATCH,
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LANGUAGE = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 64}  # fmt: skip
LIMIT = 1.15
BY_COST, BY_COUNT = "by cost", "by count"


@dataclass(frozen=True)
class Shares:
    """Encoder seconds by rank."""

    seconds: list[float]

    @property
    def imbalance(self) -> float:
        """The slowest rank's over the mean."""
        return max(self.seconds) / statistics.fmean(self.seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    parser.add_argument("--seeds", type=whole_number(1), default=100, metavar="N", help="batches (default 100)")
    parser.add_argument("--samples", type=whole_number(1), default=64, metavar="N", help="of a batch (default 64)")
    parser.add_argument("--ranks", type=whole_number(2), default=8, metavar="N", help="default 8")
    parser.add_argument("--rounds", type=whole_number(1), default=3, metavar="N", help="of each call (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures and tells. Raises ConfigError on several ranks."""
    import torch

    from .. import report

    if launch.world_size > 1:
        raise ConfigError(f"the ranks' shares are measured in one process, found {launch.world_size} ranks")
    torch.set_num_threads(1)
    encoder, cost = prepare()
    batches = []
    for seed in range(arguments.seeds):
        batches.append(measure_batch(encoder, cost, seed, arguments))
        shares = ", ".join(f"{name} {batches[-1][name]['imbalance']:.3f}" for name in (BY_COST, BY_COUNT))
        print(f"seed {seed}: {batches[-1]['images']} images, slowest rank over the mean {shares}", flush=True)
    result = report.header("media", "CPU, one thread") | {
        "tower": TOWER,
        "ranks": arguments.ranks,
        "samples": arguments.samples,
        "rounds": arguments.rounds,
        "cost": vars(cost),
        "batches": batches,
        "imbalance": {name: summarise([one[name]["imbalance"] for one in batches]) for name in (BY_COST, BY_COUNT)},
        "ratio": statistics.fmean(max(one[BY_COUNT]["seconds"]) / max(one[BY_COST]["seconds"]) for one in batches),
    }
    report.keep(result, markdown(result), arguments)
    for row in rows(result):
        print(" | ".join(row))
    print(f"ratio {result['ratio']:.2f}: the slowest rank's seconds by count over those by cost, on the mean")


def prepare() -> "tuple[VisionEncoder, MediaCost]":
    """The tower, and what its images cost, as a job measures it at its start."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.models.vision.encoder import VisionEncoder
    from megatron_vlm.models.vision.survey import survey_tower
    from megatron_vlm.planner.media_cost import measure_encoder

    tree = {
        "model": {
            "language": {"config": LANGUAGE, "tokenizer": "none"},
            "vision": {"config": TOWER, "select_layer": -1},
            "projector": {"type": "linear"},
        },
        "data": {"path": "none"},
        "precision": {"params": "fp32"},
        "training": {"steps": 1},
        "checkpoint": {"directory": "none"},
    }
    config = Config.model_validate(tree)
    encoder = VisionEncoder(survey_tower(config.model.vision, config.model.projector), config, HIDDEN, rank=0).eval()
    return encoder, measure_encoder(encoder)


def measure_batch(
    encoder: "VisionEncoder",
    cost: "MediaCost",
    seed: int,
    arguments: argparse.Namespace,
    ways: Sequence[str] = (BY_COST, BY_COUNT),
) -> dict[str, Any]:
    """One drawn batch, shared out in some ways. `arguments`: samples, ranks, rounds."""
    patches = draw_patches(seed, arguments.samples)
    found: dict[str, Any] = {"seed": seed, "images": len(patches), "patches": sum(patches)}
    for way in ways:
        shares = share_out(patches, cost, arguments.ranks, way)
        measured = Shares(encode_seconds(encoder, shares, arguments.rounds))
        found[way] = {
            "seconds": measured.seconds,
            "imbalance": measured.imbalance,
            "predicted_imbalance": predict(shares, cost).imbalance,
        }
    return found


def draw_patches(seed: int, num_samples: int) -> list[int]:
    """Patches of each image of a drawn batch."""
    from .draws import draw

    return [item.patches for sample in draw(seed, num_samples) for item in sample.media]


def share_out(patches: Sequence[int], cost: "MediaCost", num_ranks: int, way: str) -> list[list[int]]:
    """Each rank's images, by their patches."""
    from megatron_vlm.parallel.media_plan import assign

    by_cost = way == BY_COST
    ranks = assign([cost.of(p) for p in patches], num_ranks) if by_cost else split_by_count(len(patches), num_ranks)
    return [[p for p, of in zip(patches, ranks, strict=True) if of == rank] for rank in range(num_ranks)]


def predict(shares: Sequence[Sequence[int]], cost: "MediaCost") -> Shares:
    """Prediction of the cost."""
    return Shares([sum(cost.of(p) for p in share) for share in shares])


def split_by_count(num_items: int, num_ranks: int) -> list[int]:
    """The rank of each item: contiguous runs, whose sizes differ by one at most."""
    return [item * num_ranks // num_items for item in range(num_items)]


def encode_seconds(encoder: "VisionEncoder", shares: Sequence[Sequence[int]], rounds: int) -> list[float]:
    """Processor time by rank of encoding square images of so many patches each.

    Each round takes all calls of all ranks, so that what slows the machine for some seconds slows one round of a call.
    """
    import torch

    from megatron_vlm.planner.media_cost import encode_images, fastest_seconds

    cpu = torch.device("cpu")
    calls = [(rank, pixels) for rank, share in enumerate(shares) for pixels in calls_of(share)]
    fastest = [math.inf] * len(calls)
    for _ in range(rounds):
        for place, (_, pixels) in enumerate(calls):
            seconds = fastest_seconds(partial(encode_images, encoder, pixels, resizes=True), cpu, 1, warm=False)
            fastest[place] = min(fastest[place], seconds)
    by_rank = [0.0] * len(shares)
    for (rank, _), seconds in zip(calls, fastest, strict=True):
        by_rank[rank] += seconds
    return by_rank


def calls_of(patches: Sequence[int]) -> "Iterator[Any]":
    """Blank images [n, 3, H, W], of one size in each call."""
    import torch

    from megatron_vlm.planner.media_cost import IMAGES

    for size in sorted(set(patches)):
        side, count = round(size**0.5) * PATCH, patches.count(size)
        for first in range(0, count, IMAGES):
            yield torch.zeros(min(IMAGES, count - first), 3, side, side)


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Summary over the batches."""
    over = sum(value > LIMIT for value in values)
    return {"median": statistics.median(values), "mean": statistics.fmean(values), "max": max(values), "over": over}


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A heading and a line per way of sharing out."""
    table = [["shared out", "slowest rank / mean: median", "mean", "largest", f"batches over {LIMIT}"]]
    for name, found in result["imbalance"].items():
        cells = [f"{found[key]:.3f}" for key in ("median", "mean", "max")]
        table.append([name, *cells, f"{found['over']} of {len(result['batches'])}"])
    return table


def markdown(result: dict[str, Any]) -> str:
    """A section for docs/benchmarks."""
    from .. import report

    cost = result["cost"]
    heading, *lines = rows(result)
    return "\n".join(
        [
            f"\n### {len(result['batches'])} batches of {result['samples']} samples over {result['ranks']} ranks\n",
            f"{report.origin(result)}; fastest of {result['rounds']} rounds; "
            f"measured a = {cost['linear']:.3g} s per patch, b = {cost['quadratic']:.3g} s per patch squared.\n",
            f"    {result['command']}\n",
            *("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *lines)),
            f"\nThe slowest rank's seconds by count over those by cost, on the mean: {result['ratio']:.2f}.",
            "",
        ]
    )
