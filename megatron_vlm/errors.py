"""Errors that a user can fix, as one family of exceptions, and the way an error is told.

Every command line prints such an error as one line and exits non-zero (DESIGN 5). Our own broken invariants are
asserts instead: those are bugs and keep their traceback. The message names the field or file, what was found and
what is needed.

A message may quote a file name, a record or a library's own words, that is text of anybody: `shown` makes it safe for a
terminal and a log, `one_line` makes a line of any exception.
"""

import re
from collections.abc import Sequence

# Control characters but line feed and tab; what reorders text or breaks a line in some viewers; halves of surrogates,
# which no output encodes.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class MegatronVlmError(ValueError):
    """Base of everything a user can fix."""


class ConfigError(MegatronVlmError):
    """A recipe key or command-line option is wrong."""


class RecipeError(ConfigError):
    """Keys of a recipe are wrong: one line for all, where nothing else is wrong.

    Args:
        faults: one by one.
        origin: the file, where they are told of one.
    """

    def __init__(self, faults: Sequence[str], origin: str = "") -> None:
        self.origin, head = origin, f"{origin}: " if origin else ""
        super().__init__(head + "; ".join(faults))
        self.faults = tuple(head + fault for fault in faults)

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...], str]]:
        head = f"{self.origin}: " if self.origin else ""
        return type(self), (tuple(fault.removeprefix(head) for fault in self.faults), self.origin)


class SeveralFaults(ConfigError):
    """Faults of a run in several places (recipe, tokenizer, data), found together and told a line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class DataError(MegatronVlmError):
    """A data file, sample or image is wrong."""


class CheckpointError(MegatronVlmError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ConversionError(MegatronVlmError):
    """Weights do not fit the model they are to be converted to."""


class ParallelError(MegatronVlmError):
    """The ranks, their number or their groups do not fit the layout."""


class TrainingError(MegatronVlmError):
    """A run cannot go on: its numbers are not finite, or what it reports cannot be written."""


class NotFiniteError(TrainingError):
    """A run's numbers are not finite; raised by all ranks together."""


def together(
    errors: Sequence[MegatronVlmError], kind: type[RecipeError] | type[SeveralFaults] = SeveralFaults
) -> MegatronVlmError:
    """One error for all, of which there is at least one: itself where it is the only one, else one of this kind."""
    if len(errors) == 1:
        return errors[0]
    return kind(tuple(dict.fromkeys(fault for error in errors for fault in faults_of(error))))


def faults_of(error: MegatronVlmError) -> tuple[str, ...]:
    """Faults that an exception tells, one by one."""
    return error.faults if isinstance(error, RecipeError | SeveralFaults) else (one_line(error),)


def is_fault(error: BaseException) -> bool:
    """Whether an exception tells of a fault, and not of a wish to end the process.

    Libraries in Rust panic with a BaseException of their own (`pyo3_runtime.PanicException`), which no
    `except Exception` sees.
    """
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)


def shown(text: object) -> str:
    r"""Text of anybody, for a terminal or a log: control characters are escapes (`\x1b`) and send nothing.

    Line feeds and tabs stay. The marks that change the direction of text, and halves of surrogates, are escapes too.
    """
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(error: BaseException, first: bool = False) -> str:
    """The text of an exception in one line and `shown`; its kind, where it says nothing.

    Args:
        error: any exception.
        first: only the first line that is not blank, of libraries that go on with advice.
    """
    try:
        text = str(error)
    except Exception:  # a library's exception may fail to tell itself
        text = ""
    if first:
        text = next((line for line in text.splitlines() if line.strip()), "")
    return shown(" ".join(text.split())) or type(error).__name__
