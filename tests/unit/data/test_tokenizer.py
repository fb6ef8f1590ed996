"""The marker becomes one special token; what cannot serve is refused with the reason."""

from pathlib import Path

import pytest

from examples.quickstart.make_data import train_tokenizer
from megatron_vlm.data.tokenizer import check_vocabulary, load_tokenizer
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
    with pytest.raises(ConfigError, match="model.language.tokenizer: .*gone' is not a directory"):
        load_tokenizer(tmp_path / "gone", "<image>")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match="model.language.tokenizer: no tokenizer can be loaded from .*empty"
    ) as caught:
        load_tokenizer(tmp_path / "empty", "<image>")
    assert "\n" not in str(caught.value)


def test_tokens_outside_the_models_vocabulary_are_refused(tmp_path: Path) -> None:
    train_tokenizer(["some text"], 300, tmp_path / "it", extra_special=())
    tokenizer = load_tokenizer(tmp_path / "it", "<image>")
    marker = tokenizer.convert_tokens_to_ids("<image>")
    check_vocabulary(tokenizer, "<image>", marker)  # the marker alone may lie outside
    with pytest.raises(ConfigError, match="1 of its tokens lie outside the language model's vocabulary of"):
        check_vocabulary(tokenizer, "<image>", marker - 1)
