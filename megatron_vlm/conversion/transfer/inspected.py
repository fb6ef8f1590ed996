"""Facts found in a model directory, and the text that tells them."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PartFacts:
    """A part of a model: how many parameters of which dtypes."""

    num_parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A directory.

    Args:
        format: registered name, `megatron_vlm`, or `transformers` for a model of another kind.
        family: of the product's models, or the model type where it is none of them.
        parts: by name: language, vision, projector.
        files: weight files with their size in bytes.
        notes: what else is worth knowing, in sentences.
    """

    path: Path
    format: str
    family: str
    parts: dict[str, PartFacts]
    files: dict[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = sum(part.num_parameters for part in self.parts.values())
        lines = [f"{self.path}: format {self.format}, family {self.family}, {total:,} parameters"]
        lines += [f"  {name:10} {p.num_parameters:>15,}  {', '.join(p.dtypes)}" for name, p in self.parts.items()]
        lines += [f"  {name}  {size:,} bytes" for name, size in self.files.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def count_parts(tensors: Iterable[tuple[str, int, str]]) -> dict[str, PartFacts]:
    """Sums by part of the model, of its tensors' (part, number of elements, dtype as torch calls it)."""
    numbers: dict[str, int] = defaultdict(int)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for part, number, dtype in tensors:
        numbers[part] += number
        dtypes[part].add(dtype)
    return {part: PartFacts(numbers[part], tuple(sorted(dtypes[part]))) for part in sorted(numbers)}
