"""Ends of an answer: a token, or a string that its text holds.

A stop string may begin and end within tokens, so it is looked for in the text. While tokens come, only the end of the
text is decoded anew: as many tokens as can carry the longest stop string. What is finally told is cut in the whole
text, so it never holds one.

Hazard: special tokens are not in that text. A stop string that is a special token of the tokenizer is a stop token.
"""

from collections.abc import Collection, Sequence

from megatron_vlm.data.text.tokenizer import Tokenizer, faults_told
from megatron_vlm.errors import ConfigError

BYTES_PER_CHARACTER = 4  # a token carries at least one byte of UTF-8
SLACK_TOKENS = 8  # the string's first and last token are shared with other text


class Stopping:
    """The ends of a batch's answers.

    Args:
        tokenizer: that decodes them.
        ids: tokens that end an answer.
        strings: texts that end an answer and are not part of it; one or several.

    Raises:
        ConfigError: an empty stop string, or something that is none.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Collection[int], strings: str | Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        if not isinstance(strings, str | list | tuple) or not all(isinstance(text, str) for text in strings):
            raise ConfigError(f"stop: found {strings!r}, needs a text or a list of texts")
        texts = [strings] if isinstance(strings, str) else list(strings)
        if not all(texts):
            raise ConfigError("stop: found an empty string, needs texts of at least one character")
        special = {text: tokenizer.convert_tokens_to_ids(text) for text in texts if text in _special_tokens(tokenizer)}
        self.ids = frozenset(ids) | frozenset(special.values())
        self.strings = tuple(text for text in texts if text not in special)
        self._window = BYTES_PER_CHARACTER * max(map(len, self.strings), default=0) + SLACK_TOKENS

    def has_ended(self, answer: list[int]) -> bool:
        """Whether the answer ends with its last token."""
        if answer[-1] in self.ids:
            return True
        return bool(self.strings) and self._find(self._decode(answer[-self._window :])) is not None

    def text(self, answer: list[int]) -> str:
        """The answer's text up to the first stop string, without blanks at its ends."""
        text = self._decode(answer)
        return text[: self._find(text)].strip()

    def _find(self, text: str) -> int | None:
        return min((text.index(string) for string in self.strings if string in text), default=None)

    def _decode(self, ids: list[int]) -> str:
        with faults_told(self.tokenizer):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
