"""The matrix of docs/formats.md: which format holds which model, and which way weights go. From the registries."""

from collections.abc import Iterator

from megatron_vlm.conversion.formats.base import FORMATS
from megatron_vlm.models.architectures import LANGUAGE_MODELS
from megatron_vlm.models.families import FAMILIES

Cell = tuple[str, str, str, str]  # format, family, language model, direction


def language_types() -> list[str]:
    """Hugging Face model types that a directory of any of these formats can name."""
    return [name for name, architecture in LANGUAGE_MODELS.items() if architecture.llava_name is not None]


def cells() -> Iterator[Cell]:
    """Everything that is claimed, and so has a test."""
    for name in FORMATS.names():
        format = FORMATS.get(name)
        for family in FAMILIES.names():
            if family not in format.families:
                continue
            for language in language_types():
                yield name, family, language, "import"
                if format.disk_name is not None:
                    yield name, family, language, "export"


def table() -> str:
    """The matrix in Markdown."""
    claimed = set(cells())
    columns = [(family, language) for family in FAMILIES.names() for language in language_types()]
    lines = [
        f"| format | {' | '.join(f'{family}, {language}' for family, language in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name in FORMATS.names():
        found = [
            [direction for direction in ("import", "export") if (name, *column, direction) in claimed]
            for column in columns
        ]
        lines.append(f"| `{name}` | {' | '.join(', '.join(directions) or 'no' for directions in found)} |")
    return "\n".join(lines)
