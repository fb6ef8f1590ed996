"""Loading a tokenizer and giving it the image marker.

The marker becomes a special token, so that no merge crosses it and it is one id wherever it stands. That id may lie
outside the model's vocabulary: it is replaced by placeholders before anything sees it.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vlm.config.schema import TimeTokensConfig
from megatron_vlm.errors import ConfigError, is_fault, one_line, shown
from megatron_vlm.models import hub
from megatron_vlm.models.hf_config import MAX_CONFIG_BYTES, find_directory, read_settings
from megatron_vlm.runtime.files import check_regular

Tokenizer: TypeAlias = PreTrainedTokenizerBase  # for layers that may not import transformers
_KEY = "model.language.tokenizer"
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SETTINGS_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT_FILES = (*_VOCABULARY_FILES, "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json")
_TEMPLATES_FOLDER = "additional_chat_templates"  # as transformers calls it
_TRIAL = "What is it? {}\nÄ 字 12 \U0001f600"  # cut and put together once: a broken tokenizer shows it before the data


def load_tokenizer(path: str | Path | None, image_token: str) -> Tokenizer:
    """The tokenizer of a directory or hub id, knowing `image_token` as one special token.

    Raises:
        ConfigError: nothing given, nothing readable there, one that fails on a sentence, or a tokenizer without
            character offsets, which the label masks need.
    """
    if path is None:
        raise ConfigError(
            "model.language.tokenizer is null and there is no model.language.path to take it from; "
            "name a directory or hub id"
        )
    folder = find_directory(_KEY, str(path), hub.TOKENIZER_FILES)
    for name in _SETTINGS_FILES:
        if os.path.lexists(folder / name):
            read_settings(_KEY, folder / name)
    _check_texts(folder)
    try:
        with _panics_unsaid():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # a damaged file makes the tokenizers library raise almost anything
        if not is_fault(error):
            raise
        reason = one_line(error, first=True)
        if not any(os.path.isfile(folder / name) for name in _VOCABULARY_FILES):
            reason = f"it holds none of {', '.join(_VOCABULARY_FILES)}"
        raise ConfigError(f"{_KEY}: no tokenizer can be loaded from {str(path)!r}: {reason}") from error
    tokenizer.name_or_path = str(path)
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
    _try(tokenizer, image_token, str(folder))
    return tokenizer


def _check_texts(folder: Path) -> None:
    """Raises ConfigError for what the library would read whole and is no file, or larger than any real one."""
    for file in [*(folder / name for name in _TEXT_FILES), *(folder / _TEMPLATES_FOLDER).glob("*.jinja")]:
        try:
            num_bytes = check_regular(file).st_size
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{_KEY}: {one_line(error)}") from error
        if num_bytes > MAX_CONFIG_BYTES:
            raise ConfigError(f"{_KEY}: {str(file)!r} has {num_bytes:,} bytes, {MAX_CONFIG_BYTES:,} are allowed")


@contextlib.contextmanager
def faults_told(tokenizer: Tokenizer) -> Iterator[None]:
    """Guards whatever cuts texts into tokens, or puts them together again.

    Raises:
        ConfigError: in the place of what the library raises, a panic among it: the tokenizer is broken, not the text.
    """
    try:
        yield
    except BaseException as error:
        if not is_fault(error):
            raise
        reason = one_line(error, first=True)
        raise ConfigError(f"{_KEY}: the tokenizer of {tokenizer.name_or_path!r} fails on a text: {reason}") from error


def _try(tokenizer: Tokenizer, image_token: str, folder: str) -> None:
    """Raises ConfigError for a tokenizer that loads and cannot be used."""
    longest: Any = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or math.isnan(longest):
        raise ConfigError(f"{_KEY}: model_max_length is {longest!r} in {folder}/tokenizer_config.json, needs a number")
    for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if number is None:
            raise ConfigError(f"{_KEY}: the special token {token!r} in {folder} is not in its vocabulary, needs an id")
    with faults_told(tokenizer), _panics_unsaid():
        try:
            tokens = tokenizer(_TRIAL.format(image_token), add_special_tokens=False, return_offsets_mapping=True)
            tokenizer.decode(tokens["input_ids"], skip_special_tokens=True)
        except Exception as error:
            if type(error) is not Exception:  # so the library refuses a text that its vocabulary has no words for
                raise


@contextlib.contextmanager
def _panics_unsaid() -> Iterator[None]:
    """Drops what a panic writes, some lines of it, where the panic is raised, too, and will be told; all else that
    is written meanwhile follows at the end on stderr, `shown`: the library quotes keys of a file, and on stdout."""
    if sys.stderr is None or sys.stdout is None:  # closed: its number may be another file's
        yield
        return
    sys.stdout.flush()
    with open(os.memfd_create("output"), "w+b") as meanwhile:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in kept:
            os.dup2(meanwhile.fileno(), number)
        panics = False
        try:
            yield
        except BaseException as error:
            panics = is_fault(error) and not isinstance(error, Exception)
            raise
        finally:
            for number, own in kept:
                os.dup2(own, number)
                os.close(own)
            if not panics:
                meanwhile.seek(0)
                os.write(2, shown(meanwhile.read().decode("utf-8", "backslashreplace")).encode())


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
