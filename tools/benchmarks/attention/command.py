"""Attention over ranks that share a sequence: every layout (Ulysses x ring), packed and not, what it sends and takes.

One process runs the ranks of each layout in turn, on one device: the ranks' own code, with the other ranks absent and
no network. The ideal is the time that one device takes for the whole row in single calls, one per document; a layout's
share of it is that time over (the slowest rank's time x ranks). Under torchrun the ranks really exchange, and others'
context parallelism is measured beside: torch's, yunchang's, ring-flash-attn's, where they run; where not, it says why.
On the CPU every rank has one thread; what counts without a network is processor time, the fastest of the rounds.
"""

import argparse
import importlib.util
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

from .names import EXCHANGE, PACKED, TURNS, WHOLE

if TYPE_CHECKING:
    from .turns import Shape

TIMEOUT_SECONDS = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    numbers = {
        "--lengths": ([1024, 2048, 4096], "tokens of a row"),
        "--ranks": ([2, 4, 8], "ranks that share a row, all their layouts; under torchrun: its ranks"),
    }
    for name, (default, what) in numbers.items():
        words = f"{what} (default {' '.join(map(str, default))})"
        parser.add_argument(name, type=whole_number(1), nargs="+", default=default, metavar="N", help=words)
    sizes = {"--heads": (8, "query heads"), "--kv-heads": (2, "key heads"), "--width": (64, "of a head")}
    for name, (one, what) in sizes.items():
        parser.add_argument(name, type=whole_number(1), default=one, metavar="N", help=f"{what} (default {one})")
    parser.add_argument("--rounds", type=whole_number(1), default=3, metavar="N", help="default 3")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    backends = ("auto", "cudnn", "flash_attn", "triton", "cpu", "reference")
    parser.add_argument("--backend", choices=backends, default="auto", help="of ops.attention, for our layouts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="efficiency over length")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures, and tells on rank 0. Raises ConfigError for heads that do not divide, ParallelError for lengths."""
    from megatron_vlm.runtime.device import prepare

    if arguments.heads % arguments.kv_heads:
        raise ConfigError(f"--kv-heads: found {arguments.kv_heads}, needs a divisor of --heads {arguments.heads}")
    device = prepare(arguments.device, launch.local_world_size)
    import torch

    from .. import report
    from . import results
    from .turns import Shape

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = Shape(arguments.heads, arguments.kv_heads, arguments.width, dtype, device, arguments.backend)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = report.header("attention", name) | {
        "measured": TURNS if launch.world_size == 1 else EXCHANGE,
        "world_size": launch.world_size,
        "shape": {"heads": shape.heads, "kv_heads": shape.kv_heads, "width": shape.width, "dtype": str(dtype)[6:]},
        "backend": shape.backend,
        "rounds": arguments.rounds,
        "threads_per_rank": torch.get_num_threads(),
        "others": {},
    }
    if launch.world_size == 1:
        result |= {"cells": in_turn_cells(shape, arguments)}
        result["others"] = {name: why for name in OTHERS if (why := _why_not_here(name))}
    else:
        result |= exchanged(shape, launch, arguments)
    if launch.rank == 0:
        results.tell(result, arguments)


OTHERS = ("torch context_parallel", "yunchang", "ring-flash-attn")


def _why_not_here(name: str) -> str:
    """Reason why another's context parallelism is not measured in one process."""
    module = name.split()[0].replace("-", "_")
    if module != "torch" and importlib.util.find_spec(module) is None:
        return f"not run: it is not installed (pip install {name})"
    return "not run: it needs its ranks as processes; start this under torchrun"


def in_turn_cells(shape: "Shape", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A cell per length, kind of row and layout."""
    from megatron_vlm.parallel.layout import Documents, SequenceLayout

    from .turns import draw_documents, in_turn, single_device

    layouts = [(u, n // u) for n in arguments.ranks for u in range(1, n + 1) if n % u == 0]
    for length in arguments.lengths:  # what cannot be cut is told before anything is measured
        for u, r in layouts:
            SequenceLayout(length, r, u)
    cells: list[dict[str, Any]] = []
    for length in arguments.lengths:
        for kind, documents in ((WHOLE, Documents.whole(length)), (PACKED, draw_documents(length))):
            ideal = single_device(shape, documents, arguments.rounds)
            for u, r in layouts:
                costs = in_turn(shape, SequenceLayout(length, r, u), documents, arguments.rounds)
                slowest = max(costs, key=lambda one: one.seconds.both)
                pairs = [one.pairs for one in costs]
                cell = {
                    "tokens": length,
                    "rows": kind,
                    "documents": len(documents.starts),
                    "ulysses": u,
                    "ring": r,
                    "single_device_seconds": vars(ideal),
                    "slowest_rank_seconds": vars(slowest.seconds),
                    "share_of_ideal": ideal.both / (slowest.seconds.both * u * r),
                    "pairs_per_rank": statistics.fmean(pairs),
                    "imbalance_of_pairs": max(pairs) / statistics.fmean(pairs),
                    "sent_forward_bytes": max(one.sent_forward_bytes for one in costs),
                    "sent_backward_bytes": max(one.sent_backward_bytes for one in costs),
                    "ranks": [asdict(one) for one in costs],
                }
                cells.append(cell)
                print(f"{length} tokens, {kind}, ulysses {u} x ring {r}: {cell['share_of_ideal']:.1%}", flush=True)
    return cells


def exchanged(shape: "Shape", launch: Launch, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cells of real exchanges over all ranks, and why some others have none."""
    from megatron_vlm.runtime.distributed import init_world, teardown

    from .sides import measure_sides

    init_world(launch, shape.device, TIMEOUT_SECONDS)
    cells, others = measure_sides(shape, launch.world_size, arguments.lengths, arguments.rounds)
    teardown()
    return {"cells": cells, "others": others}
