"""Training throughput of a recipe, alone or against transformers.

Each side runs in a fresh process per rank. After a warm-up the sides take turns, a round each, and the median of the
rounds counts; their spread is reported. A step is everything from zeroed gradients to updated weights; making batches
is outside, and timed apart. Where the recipe's data.path is not there a data set is made that fills every row. Against
transformers both sides start from the same weights and train on the same batches, and unless their losses agree nothing
is reported.
"""

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_vlm.config import load_config
from megatron_vlm.errors import MegatronVlmError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

from ..report import Measured
from .sides import PRODUCT, TRANSFORMERS, Facts, Memory, Round, SideRequest, serve

WARM_UP_STEPS = 2
FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative
LATER_LOSS_TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2}  # rounding grows with every update
START_SECONDS = 600  # for a side's children to be built


class SidesDifferError(MegatronVlmError):
    """Two sides that do not train the same model the same way have no ratio."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    parser.add_argument("recipe", help="a YAML recipe, see tools/benchmarks/recipes/bench_*.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--against", choices=(TRANSFORMERS,), help="LlavaForConditionalGeneration under DDP")
    parser.add_argument("--rounds", type=whole_number(1), default=7, metavar="N", help="per side (default 7)")
    parser.add_argument("--steps", type=whole_number(1), default=3, metavar="N", help="per round (default 3)")
    parser.add_argument(
        "--answers", type=share, default=0.5, metavar="SHARE", help="of the words, trained (default 0.5)"
    )
    parser.add_argument(
        "--images", type=whole_number(1), default=1, metavar="N", help="in a row, where data are made (default 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a drawing of it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def share(text: str) -> float:
    """A number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"found {text!r}, needs a number above 0 and up to 1")


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures, and tells on rank 0."""
    from .. import report
    from .synthetic import SampleSize

    config = load_config(arguments.recipe, arguments.overrides)
    configs = {PRODUCT: config}
    if arguments.against:
        configs[TRANSFORMERS] = config
    rounds, steps = arguments.rounds, arguments.steps
    num_steps = WARM_UP_STEPS + (rounds + 1) * steps
    row = SampleSize(config.training.sequence_length, arguments.images)
    rows = (row,) * (config.training.global_batch_size * steps)
    requests = [SideRequest(name, c, launch, steps, num_steps, arguments.answers, rows) for name, c in configs.items()]
    measured = measure(requests, rounds)
    if launch.rank == 0:
        result = report.summarise(measured, config, launch.world_size, arguments)
        report.show(result)
        report.write(result, arguments)


def measure(requests: Sequence[SideRequest], rounds: int, warm_up_steps: int = WARM_UP_STEPS) -> dict[str, Measured]:
    """Runs the sides by turns.

    Args:
        requests: the sides, which train the same; a round is as many steps as there are batches.
        rounds: per side.

    Raises:
        SidesDifferError: their losses are not the same.
        MegatronVlmError: whatever is wrong with the recipe on either side.
    """
    steps = requests[0].num_batches
    with contextlib.ExitStack() as stack:
        sides: dict[str, Connection] = {}
        facts: dict[str, Facts] = {}
        for request in requests:  # one after the other: what the machine can do is measured too
            sides[request.name] = stack.enter_context(started(request))
            facts[request.name] = receive(sides[request.name])
        warm_up = {name: ask(side, (0, warm_up_steps, False)) for name, side in sides.items()}
        timed: dict[str, list[Round]] = {name: [] for name in sides}
        for number in range(rounds):
            for name, side in sides.items():
                timed[name].append(ask(side, (warm_up_steps + number * steps, steps, False)))
        last = warm_up_steps + rounds * steps
        phases = {name: ask(side, (last, steps, True)) for name, side in sides.items()}
        memory: dict[str, list[Memory]] = {name: ask(side, "memory") for name, side in sides.items()}
    measured = {name: Measured(facts[name], warm_up[name], timed[name], phases[name], memory[name]) for name in sides}
    first, *others = measured
    for other in others:
        losses = measured[first].losses, measured[other].losses
        refuse_unless_equal(*losses, requests[0].config.precision.params, (first, other))
    return measured


@contextlib.contextmanager
def started(request: SideRequest) -> Iterator[Connection]:
    """A side's child on this rank; ended, if need be by force, on the way out."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    child = spawning.Process(target=serve, args=(request, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here
        here.send(None)
        child.join(START_SECONDS)
    finally:
        if child.is_alive():
            child.terminate()
        child.join()


def ask(side: Connection, command: object) -> Any:
    """One command's answer."""
    side.send(command)
    return receive(side)


def receive(side: Connection) -> Any:
    """The child's next answer; its error is raised here."""
    try:
        answer = side.recv()
    except EOFError as error:
        raise RuntimeError("a side's process has ended without a word (killed, out of memory?)") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def refuse_unless_equal(
    ours: list[float], theirs: list[float], precision: str, names: tuple[str, str] = (PRODUCT, TRANSFORMERS)
) -> None:
    """Raises SidesDifferError naming the first step whose losses differ by more than rounding explains."""
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        tolerance = (LATER_LOSS_TOLERANCE if step else FIRST_LOSS_TOLERANCE)[precision]
        if not abs(mine - other) <= tolerance * abs(other):  # so that NaN is refused
            raise SidesDifferError(
                f"the sides do not train the same: loss of step {step + 1} is {mine:.6f} with {names[0]}, {other:.6f} "
                f"with {names[1]}; needed: equal to {tolerance:g} relative"
            )
