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
