"""What came of an input: it was accepted, refused in a line that a terminal may show, or there is a fault.

A refusal is judged by the line that the user would see (`runtime.failure.describe`), so a tool and a loaded model are
held to the same. A refusal for want of memory is a fault, but where the product itself had set the bound: with more
memory it would have been taken. (FFmpeg says the same of what it never asks for, being over a bound of its own.)
"""

import itertools
import traceback
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import av

from megatron_vlm.errors import MegatronVlmError
from megatron_vlm.runtime.failure import describe
from megatron_vlm.runtime.launch import Launch
from megatron_vlm.runtime.limits import LimitError

Kind = Literal[
    "accepted",
    "refused",
    "traceback",  # an exception that is no MegatronVlmError
    "not one line",  # a refusal, or anything on stdout or stderr, with what a terminal must not get
    "block",  # more processor time than allowed, or waiting for what never comes
    "memory",
    "code run",
    "network",
    "file outside",
    "crash",  # ended by a signal, or without a word
    "wrong",  # what was accepted is not what may be (`Wrong`)
    "no input",  # the fuzzer itself failed to make one
]
GOOD = ("accepted", "refused")
LONGEST_TOLD = 4000  # characters of a verdict's text that are kept


class Wrong(BaseException):
    """Raised by a reader of the fuzzer: what the product accepted is not what it may be. No Exception, as no part of
    the product shall take it for its own."""


@dataclass(frozen=True)
class Verdict:
    """What came of an input, and what was said."""

    kind: Kind
    told: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in GOOD


def of_error(error: BaseException) -> Verdict:
    """The verdict on what a reader raised."""
    trace = "".join(traceback.format_exception(error))[-LONGEST_TOLD:]
    if isinstance(error, Wrong):
        return Verdict("wrong", str(error))
    unbounded = itertools.takewhile(lambda one: not isinstance(one, LimitError), _chain(error))
    if any(isinstance(one, MemoryError) and not isinstance(one, av.FFmpegError) for one in unbounded):
        return Verdict("memory", trace)
    if not isinstance(error, MegatronVlmError):
        return Verdict("traceback", trace)
    line = describe(error, Launch(), debug=False)
    if not line.startswith("error: ") or "\n" in line or (bad := not_shown(line)):
        return Verdict("not one line", f"{line[:LONGEST_TOLD]!r}")
    assert not bad
    return Verdict("refused", line[:LONGEST_TOLD])


def not_shown(text: str) -> str:
    """The characters of a text that a terminal must not get: control characters but line feed and tab, marks that turn
    the direction of text, halves of surrogates."""
    return "".join(sorted({letter for letter in text if letter not in "\n\t" and _is_hidden(letter)}))


def _is_hidden(letter: str) -> bool:
    turns = unicodedata.bidirectional(letter) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return turns or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it was raised from or after."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
