"""Each operation's backends side by side: time, error, traffic, memory, and the share of what this machine can do.

Sides are the product's backends, torch.compile on the plain twin, and other packages where they are installed; what
cannot run says why. In a round every side runs once, forward and backward, in turn; times are medians over the
rounds, by CUDA events on a GPU, with its cache emptied before. The ceiling of a pass is the longer of its least traffic
at the measured bandwidth of a copy and its products at the measured rate of a matrix product, both measured here and
now. Errors are against the twin in fp64, at a smaller size. Behind the cells stands what they say of the project's
targets. Every operation is told as soon as it is measured, and an operation that fails stops no other.

--tiny rehearses everything on the CPU; with TRITON_INTERPRET=1 in the environment our kernels take part. Its times mean
nothing.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

from .worker import CEILINGS, Settings, Worker

if TYPE_CHECKING:
    from .case import Case

OPERATION_SECONDS = 150.0  # longer than the slowest, compiling included


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
    parser.add_argument("--rounds", type=whole_number(1), default=20, metavar="N", help="at most (default 20)")
    parser.add_argument(
        "--seconds", type=whole_number(1), metavar="N", help="of the whole run: what is not done then is left out"
    )
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

    from .. import report
    from . import results
    from .cases import CASES

    chosen = chosen_cases(arguments, CASES)
    settings = Settings(
        device.type, arguments.rounds, arguments.tiny, arguments.compile, arguments.side and tuple(arguments.side)
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = report.header("kernels", name) | {
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "rounds": arguments.rounds,
        "tiny": arguments.tiny,
        CEILINGS: {"bytes_per_second": float("nan"), "flops_per_second": float("nan")},
        "cells": [],
        "others": {},
        "failures": [],
    }
    _measure([case.op for case in chosen], Worker(settings), arguments, result)
    results.tell(result, arguments)
    if result["failures"]:
        sys.exit(1)


def _measure(ops: list[str], worker: Worker, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Adds to `result` what the operations give; the JSON file is there after each of them."""
    from .. import report
    from . import results

    deadline = time.monotonic() + (arguments.seconds or float("inf"))
    try:
        for op in (CEILINGS, *ops):
            seconds = min(OPERATION_SECONDS, deadline - time.monotonic())
            if seconds <= 0:
                result["others"][op] = "not run: the time is over"
                continue
            for name, value in worker.measure(op, seconds):
                if name == CEILINGS:
                    result[CEILINGS] = value
                elif name == "others":
                    result["others"].update([value])
                else:
                    result[name].append(value)
                if name == "cells":
                    print(results.short(value), flush=True)
            report.keep(result, "", arguments)
    finally:
        worker.stop()


def chosen_cases(arguments: argparse.Namespace, cases: "tuple[Case, ...]") -> "list[Case]":
    """Those of --op. Raises ConfigError for an operation, or a side of --side, that there is not."""
    known = {case.op: case for case in cases}
    unknown = [name for name in arguments.op or () if name not in known]
    if unknown:
        raise ConfigError(f"--op: found {unknown[0]!r}, needs one of {', '.join(known)}")
    chosen = [known[name] for name in arguments.op or known]
    from .timing import side_names

    sides = {name for case in chosen for name in side_names(case)}
    unknown = [name for name in arguments.side or () if name not in sides]
    if unknown:
        raise ConfigError(f"--side: found {unknown[0]!r}, needs one of {', '.join(sorted(sides))}")
    return chosen
