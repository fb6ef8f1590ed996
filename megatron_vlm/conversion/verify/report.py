"""Distances of two models, place by place, and in words.

A difference is measured in standard deviations of the place: activations of one layer are a thousand times those of
another, and what a rounding error may be depends on that.

Hazard: a value that is not a number compares false with everything; a place is in agreement only where its difference
is known to be within the tolerance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_vlm.conversion.verify.trace import HEAD, Trace
from megatron_vlm.errors import ConversionError

# Largest difference of any value of a place, in the place's standard deviations. Two right implementations are 1e-6 to
# 1e-4 apart in fp32, the more the deeper; a wrong layer is 0.1 and more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Difference:
    """Distance of two models at one place.

    Args:
        place: its name.
        largest, mean: absolute differences over all values.
        deviation: root mean square of both models' standard deviations.
    """

    place: str
    largest: float
    mean: float
    deviation: float

    @classmethod
    def between(cls, place: str, a: Tensor, b: Tensor) -> "Difference":
        """Compares values [rows, h] of one place."""
        apart = (a.double() - b.double()).abs()
        deviation = math.sqrt((a.double().var().item() + b.double().var().item()) / 2)
        return cls(place, apart.max().item(), apart.mean().item(), deviation)

    @property
    def relative(self) -> float:
        """The largest in deviations; of values that never vary, infinite unless they are equal."""
        return self._in_deviations(self.largest)

    @property
    def relative_mean(self) -> float:
        """The mean in deviations."""
        return self._in_deviations(self.mean)

    @property
    def agrees(self) -> bool:
        """Whether the place is within the tolerance."""
        return self.relative <= TOLERANCE

    def _in_deviations(self, value: float) -> float:
        if value == 0:
            return 0.0
        return value / self.deviation if self.deviation else math.inf


@dataclass(frozen=True)
class Comparison:
    """Two models on one question; printed as a table.

    Args:
        a, b: whose, as the caller named them.
        weights: number format both were rounded to ("bfloat16").
        num_images: images of the question.
        places: in the order of the forward pass; the head is last.
        top1: share of positions where both hold the same token for the likeliest.
        num_positions: of the question, images' tokens included.
        notes: what differs and is no error.
    """

    a: str
    b: str
    weights: str
    num_images: int
    places: tuple[Difference, ...]
    top1: float
    num_positions: int
    notes: tuple[str, ...] = ()

    @property
    def logits(self) -> Difference:
        """The head's."""
        return self.places[-1]

    @property
    def first_diverging(self) -> Difference | None:
        """The first place that is beyond the tolerance."""
        return next((place for place in self.places if not place.agrees), None)

    @property
    def agrees(self) -> bool:
        """Whether every place is within the tolerance."""
        return self.first_diverging is None

    def __str__(self) -> str:
        """A plain table: the worst place of each part, then the logits, then the verdict."""
        logits, first = self.logits, self.first_diverging
        lines = [
            f"A  {self.a}",
            f"B  {self.b}",
            f"weights in {self.weights}, arithmetic in float32; {self.num_positions} positions, "
            f"{self.num_images} image{'s' if self.num_images > 1 else ''}",
            *(f"note: {note}" for note in self.notes),
            "",
            f"{'part (place that differs most)':<44}{'largest':>10}{'mean':>10}{'largest / deviation':>21}",
        ]
        for part, places in _parts(self.places).items():
            worst = max(places, key=_severity)
            label = part if worst.place == part else f"{part} ({worst.place})"
            lines.append(f"{label:<44}{worst.largest:>10.2e}{worst.mean:>10.2e}{worst.relative:>21.2e}")
        lines += [
            "",
            f"logits: largest difference {logits.largest:.2e} ({logits.relative:.2e} of their standard deviation), "
            f"mean {logits.mean:.2e} ({logits.relative_mean:.2e})",
            f"top-1 agreement: {self.top1:.2%} of {self.num_positions} positions",
            f"tolerance: {TOLERANCE:.0e} of a place's standard deviation",
            "first diverging place: " + ("none" if first is None else f"{first.place} ({first.relative:.2e})"),
            "A and B agree" if first is None else "A and B differ",
        ]
        return "\n".join(lines)


def compare_traces(a: Trace, b: Trace) -> tuple[Difference, ...]:
    """All places, in the order of the forward pass. Raises ConversionError where the models do not have the same ones,
    or of other sizes."""
    if a.values.keys() != b.values.keys():
        only = sorted(a.values.keys() ^ b.values.keys())
        raise ConversionError(f"the models differ in their parts: only one of them has {', '.join(only[:4])}")
    differences = []
    for place, values in a.values.items():
        other = b.values[place]
        if place == HEAD:  # rows of padding on one side have nothing to be compared with
            num_common = min(values.shape[-1], other.shape[-1])
            values, other = values[..., :num_common], other[..., :num_common]
        if values.shape != other.shape:
            raise ConversionError(
                f"the models differ at {place}: A gives {list(values.shape)}, B gives {list(other.shape)}"
            )
        differences.append(Difference.between(place, values, other))
    return tuple(differences)


def top1_agreement(a: Trace, b: Trace) -> float:
    """Share of positions with the same likeliest token, rows of padding among the candidates."""
    return (a.values[HEAD].argmax(-1) == b.values[HEAD].argmax(-1)).double().mean().item()


def _severity(place: Difference) -> float:
    return math.inf if math.isnan(place.relative) else place.relative


def _parts(places: Sequence[Difference]) -> dict[str, list[Difference]]:
    """The tower's and the decoder's places together, the others alone."""
    parts: dict[str, list[Difference]] = {}
    for place in places:
        part = next((whole for whole in ("tower", "decoder") if place.place.startswith(whole)), place.place)
        parts.setdefault(part, []).append(place)
    return parts
