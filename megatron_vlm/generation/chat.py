"""A conversation of several turns with anything that answers prompts.

All turns and images so far go into every prompt; the kv cache is built anew for each, so a turn costs the prefill of
what was said before it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from megatron_vlm.generation.prompts import Dialogue, Message, Prompt


class Answers(Protocol):
    """The methods of what `load` gives."""

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> str | list[str]: ...


class Chat:
    """Remembers what was said and shown.

    Args:
        assistant: that answers.
        options: of its `generate`; every turn draws by a seed of its own, made from `seed` and the turn's number.
    """

    def __init__(self, assistant: Answers, **options: Any) -> None:
        self.assistant, self.options = assistant, options
        self.rounds: tuple[tuple[Message, str], ...] = ()

    def say(self, message: Message) -> str:
        """The answer to a text, or to texts and images mixed. A message that raises is not remembered; raises as
        `Assistant.generate`."""
        kept = [part.copy() if isinstance(part, Image.Image) else part for part in _parts(message)]
        options = {**self.options, "seed": turn_seed(self.options.get("seed", 0), len(self.rounds))}
        answer = self.assistant.generate(Dialogue(self.rounds, kept), **options)
        assert isinstance(answer, str)
        self.rounds += ((kept, answer),)
        return answer


def turn_seed(seed: int, turn: int) -> int:
    """Seed of a turn, counted from 0: the conversation's own for the first, and no neighbour's for the others."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"turn:{seed}:{turn}".encode()).digest()[:8], "little")


def _parts(message: Message) -> list[Any]:
    return [message] if isinstance(message, str) else list(message)
