"""A tokenizer's own chat template, with all that it takes besides the turns fixed by the recipe.

`data.template_arguments` are its variables (`enable_thinking: false`), the same wherever the model is asked. What it
would take from elsewhere is an argument too, or refused: a template that writes the date into its prompt
(`strftime_now`) would be another one tomorrow, so it is shown the day that `strftime_now: 2026-03-05` says, and fails
without one; one that draws at random (`lipsum`, the filter `random`) is refused.

One that takes lists of typed parts only gets each text as one part. `{% generation %}` blocks, by which a template
marks what the model says, are kept by their places.

Hazard: what a template reads is found in its syntax tree, but whether it asks for the date only by rendering it: many
do only where they are given none (`date_string`).
"""

import inspect
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.jinja import content_form, content_of
from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.limits import bounded

CLOCK = "strftime_now"
KEY = "data.template_arguments"
_OWN_PARAMETERS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
_GIVEN = frozenset({"tools", "documents"})  # of those, what a template may be given
_DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
_MONTHS = tuple("January February March April May June July August September October November December".split())
_LOCALE_FREE = "dmYyHIMSjFT"  # strftime's letters that mean the same everywhere
_NO_CLOCK = (
    f"it asks for the date ({CLOCK}), which changes every day; needs {KEY}: {{{CLOCK}: 2026-03-05}}, a fixed day, or "
    "the argument that the template takes instead (often date_string)"
)


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may ask for the date; False where it cannot be read."""
    try:
        return CLOCK in _parse(str(tokenizer.get_chat_template()))[1]
    except Exception:  # told where it is rendered
        return False


class ChatTemplate:
    """Renders turns, in bounded time and memory: a template is a program of anybody's.

    Args:
        tokenizer: with a chat template.
        arguments: variables of the template, plain values; `strftime_now` is a date, or date and time, as ISO 8601
            writes them.

    Raises:
        ConfigError: an argument that the template does not read, or that is no argument; a clock that is no date; a
            template that draws at random.
        LimitError, or whatever jinja raises: it cannot be read as a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        source = str(tokenizer.get_chat_template())
        tree, names = _parse(source)
        _refuse_unread(arguments, names, str(tokenizer.name_or_path))
        _refuse_chance(tree, names, str(tokenizer.name_or_path))
        self.arguments = {name: value for name, value in arguments.items() if name != CLOCK}
        self.marks_answers = tree.find(nodes.Scope) is not None
        self.source = _prelude(names, arguments.get(CLOCK)) + source
        self.form = content_form(self.source, self._variables()) or "texts"

    def render(self, turns: Sequence[Turn], generation_prompt: bool) -> str:
        """Their text. Raises whatever the template raises."""
        text = bounded(
            lambda: self.tokenizer.apply_chat_template(
                self._messages(turns),
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.arguments,
            )
        )
        assert isinstance(text, str)
        return text

    def render_marked(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Their text and where generation blocks stand in it, [start, end) in characters. Raises as `render`."""
        texts, places = bounded(
            lambda: render_jinja_template(
                conversations=[self._messages(turns)],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self._variables(),
            )
        )
        return texts[0], [(start, end) for start, end in places[0] if start < end]

    def _variables(self) -> dict[str, Any]:
        return {**self.tokenizer.special_tokens_map, **self.arguments}

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        return [{"role": turn.role, "content": content_of(turn.text, self.form)} for turn in turns]


class _GenerationBlocks(Extension):
    """Reads `{% generation %}` as transformers does; in the tree a block is the only kind of Scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _parse(source: str) -> tuple[nodes.Template, set[str]]:
    """Its syntax tree and the variables that it reads. Bounded, as jinja computes constants meanwhile."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.globals.clear()  # or their names would not be told among those that are read

    def read() -> tuple[nodes.Template, set[str]]:
        tree = environment.parse(source)
        return tree, meta.find_undeclared_variables(tree)

    return bounded(read)


def _refuse_unread(arguments: Mapping[str, Any], names: set[str], owner: str) -> None:
    for name in arguments:
        if name in _OWN_PARAMETERS - _GIVEN:
            raise ConfigError(f"{KEY}.{name}: the conversation itself gives it, needs another argument's name")
        if name not in names:
            given = _OWN_PARAMETERS - _GIVEN | set(jinja2.defaults.DEFAULT_NAMESPACE) | {"raise_exception"}
            readable = sorted(names - given)
            hint = did_you_mean(name, readable, f"it reads {', '.join(readable) or 'none'}")
            raise ConfigError(f"{KEY}.{name}: the chat template of {owner!r} does not read it, {hint}")


def _refuse_chance(tree: nodes.Template, names: set[str], owner: str) -> None:
    """Refuses jinja's chance: the filter, by name or through `map`, which may take a name made while it runs, and
    `lipsum`."""
    draws = "lipsum" in names
    for found in tree.find_all(nodes.Filter):
        first = found.args[0] if found.name == "map" and found.args else None
        is_open = first is not None and not isinstance(first, nodes.Const)
        draws = draws or found.name == "random" or is_open or isinstance(first, nodes.Const) and first.value == "random"
    if draws:
        raise ConfigError(
            f"data.template is 'auto', but the chat template of {owner!r} draws at random, or may (lipsum, the filter "
            "random, a map by a variable), so its text would differ each time; needs one that does not, or another "
            "template"
        )


def _prelude(names: set[str], clock: Any) -> str:
    """A macro in the place of the clock; one line, which leaves what follows as it is."""
    if CLOCK not in names:
        return ""
    # a line feed behind a block is dropped, and the next line begins as a first one
    return f"{{%- macro {CLOCK}(format) -%}}{_clock_body(clock)}{{%- endmacro %}}\n"


def _raise(message: str) -> str:
    return f"{{{{- raise_exception({message!r}) -}}}}"


def _clock_body(clock: Any) -> str:
    """A template of what strftime makes of `format` at a moment, in English wherever it runs."""
    if clock is None:
        return _raise(_NO_CLOCK)
    try:
        moment = datetime.fromisoformat(clock)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{KEY}.{CLOCK}: found {clock!r}, needs a date such as '2026-03-05'") from error
    words = {"%": "\ue002", "A": _DAYS[moment.weekday()], "B": _MONTHS[moment.month - 1]}
    words |= {"a": words["A"][:3], "b": words["B"][:3], "h": words["B"][:3], "p": "AM" if moment.hour < 12 else "PM"}
    words |= {letter: moment.strftime(f"%{letter}") for letter in _LOCALE_FREE}
    words |= {f"-{letter}": words[letter].lstrip("0") or "0" for letter in "dmyHIMSj"}
    words["e"] = f"{moment.day:2}"
    replaced = "".join(f".replace({f'%{letter}'!r}, {word!r})" for letter, word in words.items())
    unknown = _raise(f"{CLOCK} is asked for a form of the date that is none of %{' %'.join(words)}")
    return (
        f"{{%- set said = format{replaced} -%}}{{%- if '%' in said -%}}{unknown}{{%- endif -%}}"
        "{{- said.replace('\ue002', '%') -}}"
    )
