"""Each operation's backends side by side: time, error, traffic, memory, and the share of what this machine can do.

Sides are the product's backends, torch.compile on the plain twin, and other packages where they are installed; what
cannot run says why. In a round every side runs once, forward and backward, in turn; times are medians over the
rounds, by CUDA events on a GPU, with its cache emptied before. The ceiling of a pass is the longer of its least traffic
at the measured bandwidth of a copy and its products at the measured rate of a matrix product, both measured here and
now. Errors are against the twin in fp64, at a smaller size.

--tiny rehearses everything on the CPU; with TRITON_INTERPRET=1 in the environment our kernels take part. Its times mean
nothing.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

if TYPE_CHECKING:
    from .kernel_cases import Case
    from .kernel_timing import Bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    parser.add_argument("--op", nargs="+", metavar="NAME", help="operations (default: all)")
    parser.add_argument("--side", nargs="+", metavar="NAME", help="backends and other sides (default: all)")
    parser.add_argument("--tiny", action="store_true", help="sizes for the CPU and Triton's interpreter")
    parser.add_argument(
        "--compile", choices=("first", "all", "none"), default="first",
        help="sizes of each operation at which torch.compile takes part (default first: compiling takes long)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=whole_number(1), default=20, metavar="N", help="default 20")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--png", "--figure", type=Path, metavar="FILE", help="share of the ceiling, by side")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures and tells; ends with code 1 where one of our backends failed.

    Raises:
        ConfigError: an operation or a side that there is not.
    """
    from megatron_vlm.runtime.device import prepare

    device = prepare(arguments.device, launch.local_world_size)
    import torch

    from . import kernel_report, report
    from .kernel_cases import CASES
    from .kernel_timing import Bench, ceilings

    chosen = chosen_cases(arguments, CASES)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(device, dtype, arguments.rounds, arguments.tiny)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = report.header("kernels", name) | {
        "dtype": str(dtype)[6:],
        "rounds": arguments.rounds,
        "tiny": arguments.tiny,
        "ceilings": ceilings(bench),
        "cells": [],
        "others": {},
        "failures": [],
    }
    for case in chosen:
        _measure_case(bench, case, arguments, result)
    kernel_report.tell(result, arguments)
    if result["failures"]:
        sys.exit(1)


def chosen_cases(arguments: argparse.Namespace, cases: "tuple[Case, ...]") -> "list[Case]":
    """Those of --op. Raises ConfigError for an operation, or a side of --side, that there is not."""
    known = {case.op: case for case in cases}
    unknown = [name for name in arguments.op or () if name not in known]
    if unknown:
        raise ConfigError(f"--op: found {unknown[0]!r}, needs one of {', '.join(known)}")
    chosen = [known[name] for name in arguments.op or known]
    from .kernel_timing import side_names

    sides = {name for case in chosen for name in side_names(case)}
    unknown = [name for name in arguments.side or () if name not in sides]
    if unknown:
        raise ConfigError(f"--side: found {unknown[0]!r}, needs one of {', '.join(sorted(sides))}")
    return chosen


def _measure_case(bench: "Bench", case: "Case", arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Adds this operation's cells to `result`, and the reasons of the sides that have none."""
    from .kernel_timing import COMPILED, errors, is_ours, side_names, sides_of, times

    wanted = [name for name in side_names(case) if arguments.side is None or name in arguments.side]
    sizes = case.tiny if arguments.tiny else case.sizes
    found: dict[str, dict[str, Any]] = {}
    for number, of_size in enumerate(sizes):
        compiles = arguments.compile == "all" or (arguments.compile == "first" and number == 0)
        sides = sides_of(case, [name for name in wanted if name != COMPILED or compiles])
        cells, reasons = times(bench, case, of_size, sides)
        if number == 0:
            found, unmeasured = errors(bench, case, sides)
            reasons = unmeasured | reasons
        for side, cell in cells.items():
            cell |= found.get(side, {})
            result["cells"].append({"op": case.op, "sizes": dict(of_size), "side": side, **cell})
            print(f"{case.op} {words(of_size)}: {side}", flush=True)
        for side, reason in reasons.items():
            place = f"{case.op}, {side}" if reason.startswith("not run") else f"{case.op} {words(of_size)}, {side}"
            result["others"][place] = reason
            if is_ours(case, side) and reason.startswith("failed"):
                result["failures"].append(place)


def words(sizes: Any) -> str:
    """{"tokens": 8192, "hidden": 4096} -> "8192 tokens, 4096 hidden"."""
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sizes.items())
