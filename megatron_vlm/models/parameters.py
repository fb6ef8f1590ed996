"""The table of a language model's parameters: what each is called here and by Hugging Face, its shape, how it is cut.

It is the only place that says so. Derived from it are the parameter names that a recipe is checked against
(`facts.language_parameter_names`), the elements each rank holds, the FLOPs of a step, the weights that are loaded and
moved (`conversion.mappings`) and what a checkpoint needs besides. What a model type has more or otherwise is said in
the same rows, by its entry in `architectures`. `conversion/verify/` shares nothing with the table, on purpose: it is
there to find it wrong.

Hazard: rows stand in the order of the forward pass. megatron-core registers a layer's modules in another one, which
decides where its gradient buffers are padded and cut: `REGISTERED`.

Letters: h hidden, f MLP width, H heads, G kv heads (groups), d width of a head, V vocabulary. `Hd` is their product.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.models import cuts
from megatron_vlm.models.cuts import QKV, Fused, GatedMLP, Replicated, Row, Vocab

LETTERS = "hfHGdV"
QKV_BIAS, UNTIED = "qkv_bias", "untied"  # what a row may be there for only
IN_LAYER = "*."  # stands for a layer's name, which is `decoder.layers.3.` here and `model.layers.3.` there
# The order in which megatron-core registers a layer's modules: attention's output projection comes before that of its
# inputs. What begins with none of these comes last, as what a layer of one's own registers itself.
REGISTERED = (
    "input_layernorm.",
    "self_attention.linear_proj.",
    "self_attention.linear_qkv.",
    "self_attention.",
    "pre_mlp_layernorm.",
    "mlp.",
)
_PARTS, _SHAPE = re.compile(r"\{(.*)\}"), re.compile(r"\[(.*?)\]")


@dataclass(frozen=True)
class ParameterRow:
    """One row of the table.

    Args:
        ours: our name, without `language.`; with `*.` in front, of every layer ("*.mlp.linear_fc2.weight").
        theirs: canonical Hugging Face names of what it is made of, several in braces ("*.mlp.{gate,up}_proj.weight").
        shapes: of these, in letters, in their order ("[Hd, h] [Gd, h] [Gd, h]").
        cut: how it is cut over the tensor-parallel ranks.
        only: the condition that it is there for (`QKV_BIAS`, `UNTIED`); empty: always.
        after: of a row that Llama has not: ours that it follows in the forward pass; empty: the last of its layer.

    Raises:
        ConfigError: shapes that are not one for each source, or in other letters; an unknown condition.
    """

    ours: str
    theirs: str
    shapes: str
    cut: type[cuts.Mapping]
    only: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if self.only not in ("", QKV_BIAS, UNTIED):
            raise ConfigError(
                f"row {self.ours!r} of a language model's parameters: only is {self.only!r}, needs {QKV_BIAS!r}, "
                f"{UNTIED!r} or nothing"
            )
        dimensions = [dimension for shape in self._shapes for dimension in shape]
        if len(self._shapes) != len(self.sources) or not all(one and set(one) <= set(LETTERS) for one in dimensions):
            raise ConfigError(
                f"row {self.ours!r} of a language model's parameters: shapes are {self.shapes!r}, needs one in letters "
                f"of {LETTERS} for each of {', '.join(self.sources)}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """`theirs`, its braces written out."""
        found = _PARTS.search(self.theirs)
        parts = found[1].split(",") if found else [""]
        return tuple(_PARTS.sub(part, self.theirs) for part in parts)

    @property
    def _shapes(self) -> list[list[str]]:
        return [[dimension.strip() for dimension in shape.split(",")] for shape in _SHAPE.findall(self.shapes)]

    @property
    def is_in_layer(self) -> bool:
        """Whether every layer has it."""
        return self.ours.startswith(IN_LAYER)

    def mapping(self, letters: Mapping[str, int], layer: int) -> cuts.Mapping:
        """The row in names and numbers: of the model whose sizes the letters stand for, of one of its layers."""
        sources = tuple(_named(source, "model", layer) for source in self.sources)
        shapes = tuple(tuple(math.prod(letters[x] for x in dimension) for dimension in one) for one in self._shapes)
        groups = (letters["G"],) if issubclass(self.cut, QKV) else ()
        return self.cut(f"language.{_named(self.ours, 'decoder', layer)}", sources, shapes, *groups)


def _rows(*rows: tuple[Any, ...]) -> tuple[ParameterRow, ...]:
    return tuple(ParameterRow(*row) for row in rows)


# fmt: off
LLAMA = _rows(
    # ours                                  theirs                               shapes              cut
    ("embedding.word_embeddings.weight",    "model.embed_tokens.weight",         "[V, h]",           Vocab),
    ("*.input_layernorm.weight",            "*.input_layernorm.weight",          "[h]",              Replicated),
    ("*.self_attention.linear_qkv.weight",  "*.self_attn.{q,k,v}_proj.weight",   "[Hd, h] [Gd, h] [Gd, h]", QKV),
    ("*.self_attention.linear_qkv.bias",    "*.self_attn.{q,k,v}_proj.bias",     "[Hd] [Gd] [Gd]",   QKV, QKV_BIAS),
    ("*.self_attention.linear_proj.weight", "*.self_attn.o_proj.weight",         "[h, Hd]",          Row),
    ("*.pre_mlp_layernorm.weight",          "*.post_attention_layernorm.weight", "[h]",              Replicated),
    ("*.mlp.linear_fc1.weight",             "*.mlp.{gate,up}_proj.weight",       "[f, h] [f, h]",    GatedMLP),
    ("*.mlp.linear_fc2.weight",             "*.mlp.down_proj.weight",            "[h, f]",           Row),
    ("decoder.final_layernorm.weight",      "model.norm.weight",                 "[h]",              Replicated),
    ("output_layer.weight",                 "lm_head.weight",                    "[V, h]",           Vocab, UNTIED),
)
# fmt: on


def with_rows(base: Iterable[ParameterRow], own: Iterable[ParameterRow]) -> tuple[ParameterRow, ...]:
    """A table with a model type's own rows: each in the place of the one of its name, or behind the one it follows and
    all that were put there before, with what follows these in turn.

    Raises:
        ConfigError: a new row that is of no layer, or follows none of the table.
    """
    table = list(base)
    for row in own:
        names = [one.ours for one in table]
        if row.ours in names:
            table[names.index(row.ours)] = row
            continue
        in_layer = [name for name in names if name.startswith(IN_LAYER)]
        anchor = row.after or in_layer[-1]
        if not row.is_in_layer or anchor not in in_layer:
            raise ConfigError(
                f"row {row.ours!r} of a language model's parameters: found after {row.after!r}, needs a name of the "
                f"layer ({IN_LAYER}) after one of {', '.join(in_layer)}"
            )
        followed, last = {anchor}, names.index(anchor)
        for place, one in enumerate(table[last + 1 :], last + 1):
            if one.after in followed:
                followed.add(one.ours)
                last = place
        table.insert(last + 1, row)
    return tuple(table)


@dataclass(frozen=True)
class ParameterTable:
    """The parameters of one model: the rows that it has, in numbers.

    Args:
        rows: in the order of the forward pass.
        letters: what the letters of their shapes stand for.
        num_layers: of the whole model.
        fused: ours -> the one tensor on the disk that its sources are the rows of, in their order.

    Raises:
        ConfigError: one of these that is no row's.
    """

    rows: Sequence[ParameterRow]
    letters: Mapping[str, int]
    num_layers: int
    fused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [row.ours for row in self.rows]
        if unknown := sorted(self.fused.keys() - set(known)):
            raise ConfigError(
                f"fused parameters of a language model: found {', '.join(unknown)}, needs some of {', '.join(known)}"
            )

    def before_layers(self) -> list[cuts.Mapping]:
        """The parameters of the first stage alone."""
        return [self._mapping(row) for row in self.rows[: self._first_in_layer]]

    def layer(self, number: int) -> list[cuts.Mapping]:
        """The parameters of a layer, in the order of the forward pass. `number`: in the whole model, from 0."""
        return [self._mapping(row, number) for row in self.rows if row.is_in_layer]

    def layer_as_registered(self, number: int) -> list[cuts.Mapping]:
        """The parameters of a layer, in the order in which megatron-core registers them."""
        rows = sorted((row for row in self.rows if row.is_in_layer), key=_registered)
        return [self._mapping(row, number) for row in rows]

    def after_layers(self) -> list[cuts.Mapping]:
        """The parameters of the last stage alone; a tied head's is the embedding's."""
        return [self._mapping(row) for row in self.rows[self._first_in_layer :] if not row.is_in_layer]

    def names(self) -> tuple[str, ...]:
        """Global names of the whole model's, in the order of the forward pass."""
        layers = (entry for number in range(self.num_layers) for entry in self.layer(number))
        return tuple(entry.name for entry in (*self.before_layers(), *layers, *self.after_layers()))

    @property
    def num_norms(self) -> int:
        """Number of a layer's norms over the hidden width."""
        return sum(row.is_in_layer and row.shapes == "[h]" and row.ours.endswith(".weight") for row in self.rows)

    @property
    def _first_in_layer(self) -> int:
        return next(number for number, row in enumerate(self.rows) if row.is_in_layer)

    def _mapping(self, row: ParameterRow, layer: int = 0) -> cuts.Mapping:
        parts = row.mapping(self.letters, layer)
        return Fused.of(parts, _named(self.fused[row.ours], "model", layer)) if row.ours in self.fused else parts


def _registered(row: ParameterRow) -> int:
    name = row.ours.removeprefix(IN_LAYER)
    return next((place for place, start in enumerate(REGISTERED) if name.startswith(start)), len(REGISTERED))


def _named(pattern: str, stack: str, layer: int) -> str:
    """A name with the layer's in the place of `*`."""
    inside = pattern.removeprefix(IN_LAYER)
    return pattern if inside == pattern else f"{stack}.layers.{layer}.{inside}"
