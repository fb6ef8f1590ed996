"""Measures.

python tools/bench.py throughput RECIPE [section.key=value ...] [--against transformers]          (one process)
torchrun --nproc-per-node N tools/bench.py throughput RECIPE [section.key=value ...]

Each benchmark prints its own --help.
"""

import sys
from pathlib import Path

from megatron_vlm.runtime.command_line import CommandLine


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # the package `benchmarks`, however this file is run
    from benchmarks import throughput

    parser = CommandLine(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    throughput.add_arguments(
        benchmarks.add_parser("throughput", description=throughput.__doc__, help="training steps of a recipe")
    )
    with parser.run() as (arguments, launch):
        arguments.measure(arguments, launch)


if __name__ == "__main__":
    main()
