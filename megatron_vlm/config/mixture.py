"""`data.mixture` read: which sources are trained, each how often in an epoch. Pure.

    data:
      mixture: a + b*3 + c@clean*0.5          # in an epoch a once, b three times, half of c
      sources:
        a: {path: a.json}
        b: {path: b.json, media_root: images, template: plain}
        c: {mixture: d + e*1/3}               # a mixture of mixtures: its weights are multiplied

Weights are rationals, as they are written: 0.5 is 1/2, and 0.1 a tenth. A source that is named twice has the sum of its
weights. `data.path` is the short form of a mixture of one.

`@NAME` leaves records out, as VILA's slices do: those whose numbers are in `<data.subsets>/NAME/<source>.json`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from megatron_vlm.config.schema import DataConfig, SourceConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean

MOST_NESTED = 100  # mixtures of mixtures
NAME = r"[^\s+*@]+"
_TERM = re.compile(rf"({NAME})(?:\s*@\s*({NAME}))?(?:\s*\*\s*([^\s*@]+))?(?:\s*@\s*({NAME}))?")
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{0,9}|/\d{1,9})?")  # what an exponent says may fill the memory


class Slot(NamedTuple):
    """A source as a mixture names it. `subset`: of its records; empty: all of them."""

    name: str
    subset: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.subset}" if self.subset else self.name


@dataclass(frozen=True)
class Part:
    """One source of what is trained.

    Args:
        slot: how the mixture names it; that of `data.path` has the name of no source, which is empty.
        weight: how often each of its samples comes in an epoch.
        data: the recipe's section with what the source says otherwise, its `path` among it.
    """

    slot: Slot
    weight: Fraction
    data: DataConfig


def parts_of(data: DataConfig) -> list[Part]:
    """The sources of a recipe's training data, in the order of the mixture. Raises ConfigError: what is wrong with the
    mixture or with a source of it."""
    if data.mixture is None:
        return [Part(Slot(""), Fraction(1), data)]
    return [
        Part(slot, weight, _data_of(data, slot.name)) for slot, weight in expand(data.mixture, data.sources).items()
    ]


def holds_out(data: DataConfig) -> bool:
    """Whether a share of a recipe's training data is kept for evaluation. Raises as `parts_of`."""
    return any(part.data.held_out for part in parts_of(data))


def expand(mixture: str, sources: Mapping[str, SourceConfig]) -> dict[Slot, Fraction]:
    """A mixture's sources with their weights, mixtures in it replaced by their own.

    Raises:
        ConfigError: a text that is no mixture, a weight that is none, a name that no source has, a source that says
            neither or both of path and mixture, mixtures that lead in a circle.
    """
    return _expand(mixture, "data.mixture", sources, (), {})


def _expand(
    mixture: str,
    key: str,
    sources: Mapping[str, SourceConfig],
    around: tuple[str, ...],
    known: dict[str, dict[Slot, Fraction]],
) -> dict[Slot, Fraction]:
    """Does what `expand` says. `key`: where the mixture stands; `around`: the mixtures it is of; `known`: those that
    were expanded before."""
    weights: dict[Slot, Fraction] = {}
    for slot, weight in _terms(mixture, key):
        for inner, its_weight in _sources_of(slot, key, sources, around, known).items():
            weights[inner] = weights.get(inner, Fraction(0)) + weight * its_weight
    return weights


def _sources_of(
    slot: Slot,
    key: str,
    sources: Mapping[str, SourceConfig],
    around: tuple[str, ...],
    known: dict[str, dict[Slot, Fraction]],
) -> dict[Slot, Fraction]:
    name = slot.name
    if name not in sources:
        among = ", ".join(sorted(sources)) or "none: data.registry names files of them, and data.sources has them"
        near = did_you_mean(name, sources, "")
        raise ConfigError(
            f"{key}: found {name!r}, which is no source{f' ({near})' if near else ''}; there are: {among}"
        )
    entry = sources[name]
    if (entry.path is None) == (entry.mixture is None):
        found = "neither path nor mixture" if entry.path is None else "both path and mixture"
        raise ConfigError(f"data.sources.{name}: found {found}, needs exactly one of them")
    if entry.mixture is None:
        return {slot: Fraction(1)}
    if name in around:
        chain = " -> ".join([*around[around.index(name) :], name])
        raise ConfigError(f"data.sources.{name}.mixture: leads in a circle ({chain}), needs mixtures of sources")
    if len(around) == MOST_NESTED:
        raise ConfigError(f"{key}: is a mixture of mixtures, {MOST_NESTED} of them one in the other, needs fewer")
    if slot.subset:
        raise ConfigError(f"{key}: found {slot}, where {name} is a mixture; needs @{slot.subset} at its sources")
    if name not in known:
        known[name] = _expand(entry.mixture, f"data.sources.{name}.mixture", sources, (*around, name), known)
    return known[name]


def _terms(mixture: str, key: str) -> list[tuple[Slot, Fraction]]:
    terms = []
    for text in mixture.split("+"):
        term = _TERM.fullmatch(text.strip())
        if term is None or (term[2] and term[4]):
            raise ConfigError(
                f"{key}: found {text.strip()!r} in {mixture!r}, needs sources such as a + b*3 + c@clean*0.5"
            )
        terms.append((Slot(term[1], term[2] or term[4] or ""), _weight(term[3], text.strip(), key)))
    return terms


def _weight(number: str | None, term: str, key: str) -> Fraction:
    if number is None:
        return Fraction(1)
    whole = "needs a positive number such as 3, 0.5 or 1/3"
    if _NUMBER.fullmatch(number) is None or re.search(r"/0+$", number):
        raise ConfigError(f"{key}: found {term!r}, whose weight {number!r} is no number, {whole}")
    weight = Fraction(number)
    if weight <= 0:
        raise ConfigError(f"{key}: found {term!r}, whose weight is not above 0, {whole}, or the source left out")
    return weight


def _data_of(data: DataConfig, name: str) -> DataConfig:
    """The section as it is for one source: what that does not say is the section's own. Options go with the format that
    they are of, and arguments with the template."""
    entry = data.sources[name]
    said = {key: value for key in SourceConfig.model_fields if (value := getattr(entry, key)) is not None}
    for owner, owned in (("source", "source_options"), ("template", "template_arguments")):
        if owner in said and owned not in said:
            said[owned] = {}
    return data.model_copy(update={"mixture": None, **said})
