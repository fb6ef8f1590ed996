"""Token ids of a text in which a model begins to speak at given places: behind the very ids it is asked with.

Generation tokenises a prompt, and what the model says comes behind these tokens. A tokenizer that is given prompt and
answer in one text may join characters across the border, and the model would be trained behind tokens that it never
meets:

    the prompt             "A: "        A : ␣
    prompt and answer      "A: 4"       A : ␣4          begins with other tokens
    here                   "A: |4"      A : ␣ | 4       the prompt's tokens, then the rest's

Rule: the tokens up to a border are those of the text that ends there. Where the text that goes on begins with the same
tokens, its own follow, so all ids are those of the text in one piece (`apply_chat_template(tokenize=True)`). Where it
does not, the rest is tokenised by itself, as the continuation that it is: without the blank that SentencePiece puts
before a text. Llama's reference code cuts there always, LLaVA never.

Nothing reaches across a special token, so only the text since the last one is tokenised again.

The tokenizers library is called without transformers around it, which would take as long again for each part.

Hazard: a special token may take the blanks beside it with it (`rstrip`, `lstrip`). That is left as it is: the model
meets the same in its prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase

from megatron_vlm.errors import one_line

_NO_TEXT = "\ue002\ue003"  # private-use characters
_PREFIXES: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


@dataclass
class Tokens:
    """Ids and where each token's characters stand in the text, [start, end)."""

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)

    def extend(self, other: "Tokens", stop: int | None = None) -> None:
        """Appends another's, or its first `stop`."""
        self.ids += other.ids[:stop]
        self.offsets += other.offsets[:stop]

    def behind(self, start: int) -> "Tokens":
        """All from number `start` on."""
        return Tokens(self.ids[start:], self.offsets[start:])


class BorderTokenizer:
    """Tokenises texts with borders.

    Args:
        tokenizer: one with offsets.
        unknown: a special token of it that is a text as any other here.

    Raises:
        ValueError: its words are made of that token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, unknown: str | None = None) -> None:
        tokenizer("", add_special_tokens=False)  # unsets what its file says of truncation and padding
        self.tokenizer = tokenizer
        self._unknowing = None if unknown is None else without_token(tokenizer.backend_tokenizer, unknown)
        # Cut out of the text as it stands, before anything is normalised: nothing joins them.
        self.walls = {
            id_: token.content
            for id_, token in tokenizer.added_tokens_decoder.items()
            if not token.normalized and not token.single_word
        }
        self._continuing: Backend | None = None

    def tokenize(self, text: str, borders: Sequence[int] = ()) -> tuple[Tokens, list[int]]:
        """Tokens of a text, and how many of them stand before each border.

        Args:
            borders: places in the text, in order.
        """
        done = Tokens()  # all before `start`
        pending = Tokens()  # of text[start:border]
        start = border = 0
        continues = False  # whether `start` is a border, where no blank is put
        counts: list[int] = []
        for stop in (*borders, len(text)):
            part = self._part(text, start, stop, continues)
            if part.ids[: len(pending.ids)] != pending.ids:
                done.extend(pending)
                start, continues = border, True
                part = self._part(text, start, stop, continues)
            counts.append(len(done.ids) + len(part.ids))
            border = stop
            wall = next((number for number in range(len(part.ids) - 1, 0, -1) if self._is_wall(part, number, text)), 0)
            if wall:
                done.extend(part, wall)
                start, continues = part.offsets[wall][0], False
            pending = part.behind(wall)
        done.extend(pending)
        return done, counts[:-1]

    def _part(self, text: str, start: int, stop: int, continues: bool) -> Tokens:
        """Tokens of text[start:stop]; one that continues does so up to its first special token."""
        backend = self._unknowing or self.tokenizer.backend_tokenizer
        if continues:
            self._continuing = backend = self._continuing or without_prefix(backend)
        encoding = backend.encode(text[start:stop], add_special_tokens=False)
        offsets = encoding.offsets
        found = Tokens(encoding.ids, [(start + one, start + end) for one, end in offsets] if start else offsets)
        if not continues:
            return found
        wall = next((number for number in range(len(found.ids)) if self._is_wall(found, number, text)), None)
        if wall is not None:
            behind = self._part(text, found.offsets[wall][0], stop, continues=False)
            found = Tokens(found.ids[:wall], found.offsets[:wall])
            found.extend(behind)
        return found

    def _is_wall(self, tokens: Tokens, number: int, text: str) -> bool:
        """Whether a token is a special one that the text holds; models may make the same id of something else."""
        content = self.walls.get(tokens.ids[number])
        return content is not None and content in text[slice(*tokens.offsets[number])]


def without_token(backend: Backend, token: str) -> Backend:
    """A tokenizer to which a special token is a text as any other.

    The others keep their ids, as the token's stays: under a name that no text has. Raises ValueError where the model
    puts words together to that token.
    """
    tree = json.loads(backend.to_str())
    for entry in tree["added_tokens"]:
        entry["content"] = _NO_TEXT if entry["content"] == token else entry["content"]
    words = tree["model"].get("vocab")
    if isinstance(words, dict) and token in words:
        words[_NO_TEXT] = words.pop(token)
    elif isinstance(words, list):  # a Unigram's, with scores
        tree["model"]["vocab"] = [[_NO_TEXT if word == token else word, *score] for word, *score in words]
    try:
        return Backend.from_str(json.dumps(tree | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises no other kind
        raise ValueError(f"the tokenizer makes words of {token!r}: {one_line(error)}") from error


def without_prefix(backend: Backend) -> Backend:
    """A tokenizer that puts no blank before a text; else the same."""
    tree = json.loads(backend.to_str())
    changed = {name: _bare(tree[name]) for name in ("normalizer", "pre_tokenizer")}
    return Backend.from_str(json.dumps(tree | changed | {"truncation": None, "padding": None}))


def _bare(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            inner = [bare for one in step[name] if (bare := _bare(one)) is not None]
            return {**step, name: inner} if inner else None
    return step | _PREFIXES.get(step["type"], {})
