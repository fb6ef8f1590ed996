"""One training conversation, as every source gives it: turns of text and the pictures they mention."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.errors import DataError

IGNORE = -100  # label of a token that is not trained
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says; a user's text holds one image marker per picture, where the picture belongs."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Args:
        id: the file's own name for it, or its number in the file.
        turns: an optional system turn, then user and assistant in alternation, ending with the assistant.
        images: paths as written in the file, in the order of the markers.
        origin: where it stands ("train.json element 12"), for error messages.
        form: question form, by which evaluation reports; empty where the file names none.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    origin: str
    form: str = ""


class BadSample(DataError):
    """A sample that cannot be used while the others can: what `data.on_bad_sample: skip` leaves out.

    Args:
        reason: in a word or two, the same for all of the kind: they are counted by it.
    """

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason
