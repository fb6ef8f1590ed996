"""One tensor compared, and a line of the report.

Tolerances are those of the master test, L2-relative and per tensor, for fp32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

TOLERANCE = 1e-5  # of values, losses, gradient norms and gradients
UPDATE_TOLERANCE = 1e-4
ROUNDING = 1e-6  # of the total gradient norm: a gradient below it is rounding


class Allowance(NamedTuple):
    """A distance up to `tolerance * scale` is one."""

    scale: float
    tolerance: float


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor in a layout from one process.

    Args:
        phase: of the step, where it is computed ("language forward").
        what: of the tensor ("gradient of").
        tensor: its global name; where the Hugging Face model has it in parts, the part too.
        distance: L2 norm of the difference.
        allowed: for that norm.
        ranks: those whose part is off.
        where: in the tensor, if that can be said.
    """

    phase: str
    what: str
    tensor: str
    distance: float
    allowed: Allowance
    ranks: tuple[int, ...] = ()
    where: str = ""

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.distance <= self.allowed.tolerance * self.allowed.scale

    @property
    def relative(self) -> float:
        """Distance over scale."""
        if self.allowed.scale == 0:
            return math.inf if self.distance else 0.0
        return self.distance / self.allowed.scale

    def __str__(self) -> str:
        place = f", {self.where}," if self.where else ""
        allowed = f"allowed {self.allowed.tolerance:.0e}"
        return f"{self.what} {self.tensor}{place} is off by {self.relative:.1e} of its norm ({allowed})"


@dataclass(frozen=True)
class Comparison:
    """A line of the report: tensors of one kind, in the order in which they are computed."""

    title: str
    differences: tuple[Difference, ...]
    rounding: tuple[str, ...] = ()  # tensors whose true gradient is zero

    @property
    def first(self) -> Difference | None:
        """The first that does not hold."""
        return next((difference for difference in self.differences if not difference.holds), None)

    @property
    def worst(self) -> float:
        """The largest relative distance."""
        return largest(difference.relative for difference in self.differences)


def largest(distances: Iterable[float]) -> float:
    """Their maximum, NaN where any is; 0 without any."""
    return max(distances, key=lambda distance: (math.isnan(distance), distance), default=0.0)
