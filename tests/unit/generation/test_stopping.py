"""What ends an answer: stop tokens, and strings wherever the tokens' borders are."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.errors import ConfigError
from tests.helpers.models.tiny import tiny_tokenizer

TEXT = "small red circle near ☃ far green square ### yes blue"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from megatron_vlm.data.text.tokenizer import load_tokenizer

    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(tiny_tokenizer(directory), "<image>")


def stop(tokenizer: Any, strings: Any, ids: tuple[int, ...] = (), text: str = TEXT) -> tuple[int, str]:
    """How many of the text's tokens come before the answer has ended, and what it then says."""
    from megatron_vlm.generation.stopping import Stopping

    stopping = Stopping(tokenizer, ids, strings)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in range(1, len(tokens) + 1):
        if stopping.has_ended(tokens[:count]):
            return count, stopping.text(tokens[:count])
    return len(tokens) + 1, stopping.text(tokens)


def first_count(tokenizer: Any, string: str) -> int:
    """Tokens until the decoded text holds the string."""
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return next(n for n in itertools.count(1) if string in tokenizer.decode(tokens[:n], skip_special_tokens=True))


@pytest.mark.parametrize("string", ["red", "d circ", "☃", "e near ☃ f", "##", "l", TEXT[3:44], "e"])
def test_ends_at_once_and_is_cut_there(tokenizer, string):
    """Every string lies across tokens somewhere: the tiny vocabulary cuts words into pieces."""
    assert stop(tokenizer, string) == (first_count(tokenizer, string), TEXT[: TEXT.index(string)].strip())


def test_the_first_of_several_strings_counts(tokenizer):
    count, text = stop(tokenizer, ["green", "circle", "nowhere"])
    assert (count, text) == (first_count(tokenizer, "circle"), "small red")


def test_a_string_that_does_not_come_changes_nothing(tokenizer):
    count, text = stop(tokenizer, "purple")
    assert text == TEXT and count > len(tokenizer(TEXT)["input_ids"])


def test_a_string_far_behind_is_found_in_a_long_answer(tokenizer):
    """Only the end is decoded anew: what matters there must be enough."""
    text = "blue " * 300 + TEXT
    count, said = stop(tokenizer, "near ☃ far green square ###", text=text)
    assert said == ("blue " * 300 + "small red circle").strip()
    assert count < len(tokenizer(text)["input_ids"])


def test_a_special_token_is_a_stop_token(tokenizer):
    end = tokenizer.convert_tokens_to_ids("</s>")
    count, text = stop(tokenizer, "</s>", text="small</s>red")
    assert (
        text == "smallred"[: len("small")]
        and count == len(tokenizer("small", add_special_tokens=False)["input_ids"]) + 1
    )
    assert end not in tokenizer("small", add_special_tokens=False)["input_ids"]


def test_an_empty_string_is_an_error(tokenizer):
    from megatron_vlm.generation.stopping import Stopping

    with pytest.raises(ConfigError, match="stop: found an empty string"):
        Stopping(tokenizer, (), ["a", ""])
