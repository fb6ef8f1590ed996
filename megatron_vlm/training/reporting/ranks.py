"""One step compared over the ranks: time by phase, memory, and who holds the others up.

Most phases tell of the whole job, not of a rank: whoever is late to a collective makes all the others wait in theirs,
so a slow rank's own pipeline time is even the shortest. Only phases in which a rank waits for nobody can name it:
waiting for its own data workers, and tower and projector over its own images.

Hazard: on a GPU a phase's time is its own only where the device is waited for at its end; the steps compared do so.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DATA = "data"
OWN_WORK = (DATA, "encode")
SLOW_RATIO = 1.5  # to the median of the other ranks
SLOW_SECONDS = 0.010  # above it; less is noise
NUM_REPORTS = 3  # in a row, before a rank is told to hold the others up


@dataclass(frozen=True)
class RankFigures:
    """One rank's step."""

    phase_seconds: dict[str, float]
    peak_memory_bytes: int


@dataclass(frozen=True)
class Spread:
    """A figure over the ranks, and the rank with the largest."""

    mean: float
    max: float
    rank: int


@dataclass(frozen=True)
class Straggler:
    """A rank whose own work took far longer than the other ranks'."""

    rank: int
    phase: str
    seconds: float
    median_seconds: float  # of the other ranks

    def __str__(self) -> str:
        return (
            f"rank {self.rank} holds the others up: {self.phase} took {self.seconds * 1e3:,.0f} ms there, "
            f"{self.median_seconds * 1e3:,.0f} ms is the median of the other ranks"
        )


@dataclass(frozen=True)
class RankComparison:
    """A step over all ranks, `figures` by rank."""

    figures: list[RankFigures]

    @property
    def phases(self) -> dict[str, Spread]:
        """Seconds by phase."""
        return {
            phase: _spread([figures.phase_seconds[phase] for figures in self.figures])
            for phase in self.figures[0].phase_seconds
        }

    @property
    def peak_memory(self) -> Spread:
        """Bytes."""
        return _spread([figures.peak_memory_bytes for figures in self.figures])

    @property
    def straggler(self) -> Straggler | None:
        """The rank with the most time above the others' median in a phase of its own work, where that is a lot."""
        found = []
        for phase in OWN_WORK:
            seconds = [figures.phase_seconds[phase] for figures in self.figures]
            for rank, own in enumerate(seconds):
                median = statistics.median([*seconds[:rank], *seconds[rank + 1 :]] or [own])
                if own > SLOW_RATIO * median and own - median > SLOW_SECONDS:
                    found.append(Straggler(rank, phase, own, median))
        return max(found, key=lambda one: one.seconds - one.median_seconds, default=None)

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "phases": {
                phase: {"mean": spread.mean, "max": spread.max, "slowest_rank": spread.rank}
                for phase, spread in self.phases.items()
            },
            "peak_memory_bytes": {
                "mean": self.peak_memory.mean,
                "max": self.peak_memory.max,
                "fullest_rank": self.peak_memory.rank,
            },
            "straggler": None if self.straggler is None else vars(self.straggler),
        }


class StragglerWatch:
    """Tells a rank that stays behind from one that was late once: named where it is the same rank in the same phase in
    NUM_REPORTS compared steps in a row, and once for each such series."""

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None
        self._num_reports = 0

    def see(self, straggler: Straggler | None) -> Straggler | None:
        """One compared step's straggler -> the same where it is to be told now."""
        found = None if straggler is None else (straggler.rank, straggler.phase)
        self._num_reports = self._num_reports + 1 if found == self._last else 1
        self._last = found
        return straggler if self._num_reports == NUM_REPORTS else None


def _spread(values: Sequence[float]) -> Spread:
    largest = max(range(len(values)), key=lambda rank: values[rank])
    return Spread(statistics.fmean(values), values[largest], largest)
