"""The schema walked: every key and every section by its dotted name, such as `optimizer.lr`.

A section that may be null (`loss.time_tokens`) is compared and accepted as one value, but has keys of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_vlm.config.schema.recipe import Config

Sections = type[BaseModel]


def fields(section: Sections = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every key and every section, a section before what is in it."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_of(field)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> Sections | None:
    """The section that a field holds, or may hold; None where it holds a value."""
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def is_one_value(field: FieldInfo) -> bool:
    """Whether a field is compared and accepted whole: a value, or a section that may be null."""
    return section_of(field) is not field.annotation


def keys_and_sections() -> Iterator[str]:
    """Every key that is compared as one value, and every section around them, dotted."""
    whole = tuple(f"{key}." for key, field in fields() if is_one_value(field))
    return (key for key, _ in fields() if not key.startswith(whole))


def leaves(tree: Mapping[str, Any], section: Sections = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key in a recipe's tree; a model's own `config` is one value."""
    for name, value in tree.items():
        field = section.model_fields[name]
        inner = section_of(field)
        if inner is None or is_one_value(field):
            yield f"{prefix}{name}", value
        else:
            yield from leaves(value, inner, f"{prefix}{name}.")
