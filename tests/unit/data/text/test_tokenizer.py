"""The marker becomes one special token; what cannot serve is refused with the reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vlm.config.schema import TimeTokensConfig
from megatron_vlm.data.text.new_tokenizer import train_tokenizer
from megatron_vlm.data.text.tokenizer import check_vocabulary, first_time_token, load_tokenizer
from megatron_vlm.errors import ConfigError


def test_marker_is_added_only_where_missing(tmp_path: Path) -> None:
    size = train_tokenizer(["some text"], 300, tmp_path / "with")
    assert len(load_tokenizer(tmp_path / "with", "<image>")) == size
    size = train_tokenizer(["some text"], 300, tmp_path / "without", extra_special=())
    tokenizer = load_tokenizer(tmp_path / "without", "<image>")
    assert tokenizer.convert_tokens_to_ids("<image>") == size
    ids = tokenizer("x<image>\ny <image>", add_special_tokens=False)["input_ids"]
    assert ids.count(size) == 2


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.language.tokenizer is null"):
        load_tokenizer(None, "<image>")
    with pytest.raises(ConfigError, match="model.language.tokenizer: found '.*gone', which is not there"):
        load_tokenizer(tmp_path / "gone", "<image>")


REMOTE_CODE = '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "from '.*': it holds none of tokenizer.json, tokenizer.model"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "holds special tokens and no others"),
        ({"tokenizer.json": "{"}, "no tokenizer can be loaded from '.*': Expecting property name"),
        ({"tokenizer.json": "[]"}, "no tokenizer can be loaded from '.*': "),
        ({"tokenizer.json": '{"added_tokens": [], "model": {"type": "Own"}}'}, "no tokenizer can be loaded from"),
        ({"tokenizer_config.json": REMOTE_CODE, "tokenizer.json": "{}"}, "contains custom code which must be executed"),
    ],
)
def test_directories_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], expected: str
) -> None:
    """Nobody is asked whether to run code either."""
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"model.language.tokenizer: .*{expected}") as caught:
        load_tokenizer(tmp_path, "<image>")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


def test_tokens_outside_the_models_vocabulary_are_refused(tmp_path: Path) -> None:
    train_tokenizer(["some text"], 300, tmp_path / "it", extra_special=())
    tokenizer = load_tokenizer(tmp_path / "it", "<image>")
    marker = tokenizer.convert_tokens_to_ids("<image>")
    check_vocabulary(tokenizer, "<image>", marker)  # the marker alone may lie outside
    with pytest.raises(ConfigError, match="1 of its tokens lie outside the language model's vocabulary of"):
        check_vocabulary(tokenizer, "<image>", marker - 1)


def knowing(**tokens: int) -> Any:
    """Stands for a tokenizer: the ids of its tokens."""
    return SimpleNamespace(get_vocab=lambda: tokens)


def test_time_tokens_are_found_by_their_names() -> None:
    tokens = TimeTokensConfig(format="<t{t}>", count=3)
    assert tokens.names() == ("<t0>", "<t1>", "<t2>")
    assert first_time_token(knowing(**{"a": 3, "<t0>": 7, "<t1>": 8, "<t2>": 9}), tokens) == 7


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (
            {"<t0>": 7, "<t1>": 8},
            "found 3 tokens '<t0>' to '<t2>', of which the tokenizer lacks 1, the first is '<t2>'",
        ),
        ({"<t0>": 7, "<t1>": 9, "<t2>": 8}, "found '<t1>' with id 9 in the tokenizer, where '<t0>' has 7; needs 8"),
    ],
)
def test_time_tokens_that_are_absent_or_scattered_are_refused(known: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^loss.time_tokens: {message}"):
        first_time_token(knowing(**known), TimeTokensConfig(count=3))
