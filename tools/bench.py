"""Measures.

python tools/bench.py throughput RECIPE [section.key=value ...] [--against transformers]          (one process)
python tools/launch.py --local --ranks N -- tools/bench.py throughput RECIPE [section.key=value ...]
python tools/bench.py conversion --folder SCRATCH [--size GB]
python tools/bench.py decoding RECIPE [section.key=value ...]
python tools/bench.py media [--seeds N]
python tools/bench.py packing RECIPE [section.key=value ...]
python tools/bench.py attention [--lengths N ...] [--ranks N ...]                                 (ranks in turn)
python tools/launch.py --local --ranks N -- tools/bench.py attention [--lengths N ...]
python tools/bench.py kernels [--op NAME ...] [--tiny]
python tools/bench.py startup [--checkout FOLDER]

Each benchmark prints its own --help.
"""

import sys
from pathlib import Path

from megatron_vlm.runtime.command_line import CommandLine


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # the package `benchmarks`, however this file is run
    from benchmarks.attention import command as attention
    from benchmarks.conversion import command as conversion
    from benchmarks.decoding import command as decoding
    from benchmarks.kernels import command as kernels
    from benchmarks.media import command as media
    from benchmarks.startup import command as startup
    from benchmarks.training import packing, throughput

    parser = CommandLine(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    throughput.add_arguments(
        benchmarks.add_parser("throughput", description=throughput.__doc__, help="training steps of a recipe")
    )
    decoding.add_arguments(
        benchmarks.add_parser(
            "decoding", description=decoding.__doc__, help="tokens of an answer, against transformers"
        )
    )
    conversion.add_arguments(
        benchmarks.add_parser("conversion", description=conversion.__doc__, help="import and export of weights")
    )
    media.add_arguments(
        benchmarks.add_parser(
            "media", description=media.__doc__, help="balance of the vision encoder's work over ranks"
        )
    )
    packing.add_arguments(
        benchmarks.add_parser("packing", description=packing.__doc__, help="ways to make rows of samples, side by side")
    )
    attention.add_arguments(
        benchmarks.add_parser(
            "attention", description=attention.__doc__, help="attention over ranks that share a sequence"
        )
    )
    kernels.add_arguments(
        benchmarks.add_parser("kernels", description=kernels.__doc__, help="an operation's backends, side by side")
    )
    startup.add_arguments(
        benchmarks.add_parser(
            "startup", description=startup.__doc__, help="what commands cost before they work, and what they import"
        )
    )
    with parser.run() as (arguments, launch):
        arguments.measure(arguments, launch)


if __name__ == "__main__":
    main()
