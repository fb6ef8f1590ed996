"""A layout's records against that of one process, in the order in which a step computes things.

Forward values first, then gradients in the order of the backward pass, then updates: the first difference is where the
layout goes wrong, and what comes after it is the consequence.

Hazard: a gradient norm is megatron-core's own, a sum of squares in fp32, whose rounding grows with their number: that
of a table of 150,000 tokens depends on how it is cut by more than any tensor does.
"""

import math
from collections.abc import Iterator, Sequence

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.layout_check.difference import TOLERANCE, Allowance, Comparison, Difference, largest
from megatron_vlm.training.layout_check.parameters import Parameters
from megatron_vlm.training.layout_check.record import Record
from megatron_vlm.training.layout_check.values import compare_values

EXACT_SQUARES = 1_000_000  # up to so many the gradient norm has the tolerance of everything else


def compare(one: Record, many: Sequence[Record], config: Config) -> list[Comparison]:
    """Everything that was recorded.

    Args:
        one: of one process.
        many: of every rank of the layout.
        config: the layout's recipe.
    """
    parameters = Parameters(config, GridSizes.from_config(config.parallel, len(many)), one, many)
    gradients = parameters.gradients()
    first, later = range(1), range(1, len(one.losses))
    return [
        Comparison("samples of each step", tuple(_samples(one, many))),
        parameters.initial(),
        *compare_values(one, many),
        Comparison("loss of step 1", tuple(_numbers("loss", one, many, first))),
        gradients,
        Comparison("gradient norm of step 1", tuple(_numbers("gradient norm", one, many, first))),
        parameters.updates(gradients.rounding),
        Comparison("losses of later steps", tuple(_numbers("loss", one, many, later))),
        Comparison("gradient norms of later steps", tuple(_numbers("gradient norm", one, many, later))),
    ]


def _samples(one: Record, many: Sequence[Record]) -> Iterator[Difference]:
    for step, wanted in enumerate(one.sample_ids):
        ranks = tuple(record.rank for record in many if record.sample_ids[step] != wanted)
        yield Difference("data", "samples of", f"step {step + 1}", float(len(ranks)), Allowance(len(many), 0.0), ranks)


def _numbers(what: str, one: Record, many: Sequence[Record], steps: range) -> Iterator[Difference]:
    """The loss or the gradient norm of some steps, on every rank."""
    field, phase = {"loss": ("losses", "loss"), "gradient norm": ("norms", "language backward")}[what]
    tolerance = TOLERANCE
    if what == "gradient norm":
        num_squares = sum(gradient.numel() for gradient in one.gradients.values())
        tolerance *= max(1.0, math.sqrt(num_squares / EXACT_SQUARES))
    for step in steps:
        wanted = getattr(one, field)[step]
        distances = {record.rank: abs(getattr(record, field)[step] - wanted) for record in many}
        ranks = tuple(rank for rank, distance in distances.items() if not distance <= tolerance * abs(wanted))
        yield Difference(
            "optimizer" if step else phase, f"{what} of", f"step {step + 1}",
            largest(distances.values()), Allowance(abs(wanted), tolerance), ranks,
        )  # fmt: skip


def first_difference(comparisons: Sequence[Comparison]) -> Difference | None:
    """The first that does not hold."""
    return next((comparison.first for comparison in comparisons if comparison.first), None)
