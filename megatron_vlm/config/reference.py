"""The reference of the recipe: every key with its type, default, meaning and rules, and whether it may change on a
resume. The schema and the rules are read, so what is told is what is checked.

`megatron-vlm config` prints it; `megatron-vlm config --markdown` writes docs/configuration.md, which a test compares.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megatron_vlm.config.rules.gathered import may_change, told_at
from megatron_vlm.config.schema import Config
from megatron_vlm.config.schema.tree import Sections, fields, is_one_value, section_of
from megatron_vlm.errors import ConfigError

COLUMNS = 100
COMMENTS_AT = 46  # column of the meanings beside the tree
MOST_NEAR = 3  # keys named where a mistyped one is not found
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "keys with values", Any: "any"}
_SIGNS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}
_HEAD = """\
# Configuration

Every key of a recipe, by section. This page is made from the schema (`megatron_vlm/config/schema/`) and the rules
(`megatron_vlm/config/rules/`) by `megatron-vlm config --markdown`, and a test compares it; `megatron-vlm config` prints
the tree with its defaults, `megatron-vlm config SECTION` and `megatron-vlm config SECTION.KEY` what is here.

A recipe is a YAML file of these sections. `base: OTHER.yaml` starts from another recipe, whose keys it overrides;
`SECTION.KEY=VALUE` on the command line overrides both, and `null` stands for nothing. A key without a default needs a
value. *On resume* says whether a run may go on from its checkpoints with another value; any other change is refused,
unless `checkpoint.accept_changes` names it.
"""


@dataclass(frozen=True)
class Entry:
    """One key of the recipe.

    Args:
        key: dotted.
        kind: its type and limits, in words.
        default: as YAML has it; None: it needs a value.
        meaning: its description.
        rules: sentences of the rules over it.
        may_change: whether a resumed run may have another value.
    """

    key: str
    kind: str
    default: str | None
    meaning: str
    rules: tuple[str, ...]
    may_change: bool

    def __str__(self) -> str:
        head = f"{self.key}: {self.kind}, {'needs a value' if self.default is None else f'default {self.default}'}"
        resume = "may change" if self.may_change else "may not change"
        lines = [self.meaning, *(f"Rule: {rule}" for rule in self.rules), f"On resume: {resume}."]
        return "\n".join([head, *(_wrapped(line, "    ") for line in lines)])


def entries() -> Iterator[Entry]:
    """Every key of the recipe, in the schema's order."""
    for key, field in fields():
        if not is_one_value(field):
            continue
        assert field.description, f"a test checks that {key} has a description"
        rules = tuple(_sentence(text) for text in told_at(key))
        yield Entry(key, kind_of(field), default_of(field), field.description, rules, may_change(key))


def kind_of(field: FieldInfo) -> str:
    """A field's type and limits in words: `integer > 0 or null`."""
    return _in_words(field.annotation, field.metadata)


def default_of(field: FieldInfo) -> str | None:
    """A field's default as YAML has it; None where there is none."""
    if field.is_required():
        return None
    return field.default if isinstance(field.default, str) else json.dumps(field.default)


def explain(name: str) -> str:
    """A key, or a section with all its keys, whole.

    Raises:
        ConfigError: there is neither of that name; with the nearest ones.
    """
    known = {key: section_of(field) for key, field in fields()}
    if name not in known:
        raise ConfigError(f"key: found {name!r}, which is neither key nor section, {_near(name, [*known])}")
    found = [str(entry) for entry in entries() if entry.key == name or entry.key.startswith(f"{name}.")]
    section = known[name]
    head = [] if section is None else [_wrapped(f"{name}: {_about(section)}", "")]
    return "\n\n".join([*head, *found])


def tree() -> str:
    """All sections and keys with their defaults, as YAML, with the first sentence of each one's meaning."""
    lines = []
    for key, field in fields():
        *outer, name = key.split(".")
        section = section_of(field)
        is_section = not is_one_value(field)
        value = "" if is_section else default_of(field)
        about = _about(section) if section is not None and is_section else str(field.description)
        needed = "Needs a value. " if value is None else ""
        start = f"{'  ' * len(outer)}{name}:{f' {value}' if value else ''}"
        if any(is_one_value(one) for one in _around(outer)):  # a key of a section that is null
            start = f"{'  ' * (len(outer) - 1)}# {name}:{f' {value}' if value else ''}"
        lines.append(f"{start:<{COMMENTS_AT - 2}}  # {needed}{about.partition('. ')[0].rstrip('.')}.")
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md."""
    parts, everything = [_HEAD], list(entries())
    for name, field in Config.model_fields.items():
        section = section_of(field)
        about = "" if section is None else f"{_about(section)}\n\n"
        rows = [_row(entry) for entry in everything if entry.key.split(".")[0] == name]
        head = "| key | type | default | meaning | rules | on resume |\n|---|---|---|---|---|---|\n"
        parts.append(f"## {name}\n\n{about}{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(entry: Entry) -> str:
    default = "" if entry.default is None else f"`{entry.default}`"
    resume = "may change" if entry.may_change else "may not change"
    cells = [f"`{entry.key}`", entry.kind, default, entry.meaning, " ".join(entry.rules), resume]
    assert not any("|" in cell for cell in cells), cells
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _around(outer: list[str]) -> Iterator[FieldInfo]:
    """The fields of the sections around a key."""
    known = dict(fields())
    return (known[".".join(outer[: depth + 1])] for depth in range(len(outer)))


def _about(section: Sections) -> str:
    return " ".join(str(section.__doc__).split())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _near(name: str, known: list[str]) -> str:
    """The nearest keys: those of the same last name, else those that are spelt alike, whole or in their last name."""
    last = name.rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, known, n=MOST_NEAR)
    if not near:
        alike = difflib.get_close_matches(last, {key.rpartition(".")[2] for key in known}, n=MOST_NEAR)
        near = [key for one in alike for key in known if key.rpartition(".")[2] == one]
    sections = ", ".join(Config.model_fields)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"needs one of {sections}, or a key in one"


def _in_words(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with the limits that its metadata has."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(inner[0], [*inner[1:], *metadata])
    if origin in (Union, UnionType):
        return " or ".join("null" if one is NoneType else _in_words(one, []) for one in inner)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin is tuple:
        same = inner[-1] is Ellipsis
        return f"list of {_in_words(inner[0], [])}" if same else f"list of {len(inner)}: {_in_words(inner[0], [])}"
    is_section = isinstance(annotation, type) and hasattr(annotation, "model_fields")
    word = "keys with values" if is_section else _WORDS[origin or annotation]
    limits = [limit for one in metadata for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
    told = [f"{_SIGNS[type(one)][1]} {getattr(one, _SIGNS[type(one)][0]):g}" for one in limits if type(one) in _SIGNS]
    return " ".join([word, " and ".join(told)]).strip()
