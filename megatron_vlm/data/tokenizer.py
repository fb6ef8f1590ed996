"""Loading a tokenizer and giving it the image marker.

The marker becomes a special token, so that no merge crosses it and it is one id wherever it stands. That id may lie
outside the model's vocabulary: it is replaced by placeholders before anything sees it.
"""

import os
from pathlib import Path
from typing import TypeAlias

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vlm.config.schema import TimeTokensConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import refuse_missing_directory

Tokenizer: TypeAlias = PreTrainedTokenizerBase  # for layers that may not import transformers
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path | None, image_token: str) -> Tokenizer:
    """The tokenizer of a directory or hub id, knowing `image_token` as one special token.

    Raises:
        ConfigError: nothing given, nothing readable there, or a tokenizer without character offsets, which the label
            masks need.
    """
    if path is None:
        raise ConfigError(
            "model.language.tokenizer is null and there is no model.language.path to take it from; "
            "name a directory or hub id"
        )
    refuse_missing_directory("model.language.tokenizer", str(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # a damaged file makes the tokenizers library raise almost anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in _VOCABULARY_FILES):
            reason = f"it holds none of {', '.join(_VOCABULARY_FILES)}"
        raise ConfigError(
            f"model.language.tokenizer: no tokenizer can be loaded from {str(path)!r}: {reason}"
        ) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):  # made up, where files are missing
        raise ConfigError(
            f"model.language.tokenizer: {str(path)!r} holds special tokens and no others, needs one of "
            f"{', '.join(_VOCABULARY_FILES)}"
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.language.tokenizer: {str(path)!r} gives a {type(tokenizer).__name__} without character offsets; "
            "a directory with a tokenizer.json is needed"
        )
    if image_token not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, image_token: str, vocab_size: int) -> None:
    """Raises ConfigError where a token lies outside the language model's table of `vocab_size` rows.

    The image marker may: placeholders stand for it.
    """
    outside = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and token != image_token
    )
    if outside:
        number, token = outside[0]
        raise ConfigError(
            f"model.language.tokenizer: {len(outside)} of its tokens lie outside the language model's vocabulary of "
            f"{vocab_size}, the first is {token!r} with id {number}; needs a tokenizer of that model"
        )


def first_time_token(tokenizer: Tokenizer, time_tokens: TimeTokensConfig) -> int:
    """The id of the first time token, which the others follow.

    Raises:
        ConfigError: a time token that the tokenizer lacks, or that does not follow the one before.
    """
    known, names = tokenizer.get_vocab(), time_tokens.names()
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"loss.time_tokens: found {time_tokens.count} tokens {names[0]!r} to {names[-1]!r}, of which the tokenizer "
            f"lacks {len(missing)}, the first is {missing[0]!r}; needs a tokenizer that has them all, with consecutive "
            "ids, and a language model with rows for them"
        )
    first = known[names[0]]
    for place, name in enumerate(names):
        if known[name] != first + place:
            raise ConfigError(
                f"loss.time_tokens: found {name!r} with id {known[name]} in the tokenizer, where {names[0]!r} has "
                f"{first}; needs {first + place}: the ids of time tokens are consecutive"
            )
    return first
