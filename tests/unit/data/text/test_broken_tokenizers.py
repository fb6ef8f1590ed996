"""Tokenizers of anybody: what is broken is one line that names the directory, a panic of the library among it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.generation.stopping import Stopping
from tests.helpers.models.tiny import tiny_tokenizer

Settings = dict[str, Any]
EMPTY = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("whole"))


def spoilt(whole: Path, tmp_path: Path, file: str, change: Callable[[Settings], Any]) -> Path:
    folder = tmp_path / "spoilt"
    shutil.copytree(whole, folder)
    settings = json.loads((folder / file).read_text())
    changed = change(settings)
    (folder / file).write_text(json.dumps(settings if changed is None else changed))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError, match="^model.language.tokenizer: ") as caught:
        load_tokenizer(folder, "<image>")
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def put(**values: Any) -> Callable[[Settings], Any]:
    return lambda settings: settings.update(values)


PANICS: dict[str, Callable[[Settings], Any]] = {
    "replaces nothing": put(normalizer=EMPTY),
    "pieces of no length": put(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "prefix longer than words": lambda settings: settings["model"].update(continuing_subword_prefix="x" * 50),
    "characters that are none": put(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
}


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_is_one_line(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """`pyo3_runtime.PanicException` is no Exception, and the library writes a trace of its own to stderr."""
    refused(spoilt(whole, tmp_path, "tokenizer.json", PANICS[name]))
    assert "panicked" not in capfd.readouterr().err


def test_what_else_is_written_to_stderr_while_a_tokenizer_loads_is_kept(
    whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vlm.data.text import tokenizer

    load = tokenizer.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        tokenizer.AutoTokenizer, "from_pretrained", lambda *a, **k: os.write(2, b"a word\n") and load(*a, **k)
    )
    load_tokenizer(whole, "<image>")
    assert capfd.readouterr().err == "a word\n"


def test_what_the_library_says_of_a_file_s_keys_sends_no_control_characters(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = spoilt(whole, tmp_path, "tokenizer.json", lambda s: s["added_tokens"][0].update({"x\0\x1b[2J": 1}))
    load_tokenizer(folder, "<image>")
    assert r"x\x00\x1b[2J" in capfd.readouterr().err


CONFIGS: dict[str, tuple[Callable[[Settings], Any], str]] = {
    "text for a length": (put(model_max_length="x"), "model_max_length is 'x' in .*tokenizer_config.json, needs a num"),
    "list for a length": (put(model_max_length=[1]), r"model_max_length is \[1\]"),
    "truth for a length": (put(model_max_length=True), "model_max_length is True"),
    "no number": (
        put(model_max_length=float("nan")),
        "tokenizer_config.json': model_max_length is nan, needs a finite",
    ),
    "list": (lambda _: [], "tokenizer_config.json' holds a list, needs an object"),
    "special token": (put(bos_token=5), "bos_token"),
    "half a surrogate": (put(pad_token="\ud800"), "tokenizer_config.json' is not a valid JSON file"),
    "side": (put(padding_side=5), "(?i)padding side"),
    "added tokens": (put(added_tokens_decoder=[1]), "no tokenizer can be loaded"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrongly_typed_setting_is_named(whole: Path, tmp_path: Path, name: str) -> None:
    change, message = CONFIGS[name]
    assert re.search(message, refused(spoilt(whole, tmp_path, "tokenizer_config.json", change)))


DEEP = "[" * 100_000


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.timeout(60)
def test_what_is_no_readable_text_is_told(whole: Path, tmp_path: Path, file: str) -> None:
    for number, content in enumerate((b"\xff\xfe", b"", b"{", b"null", DEEP.encode())):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / file).write_bytes(content)
        refused(folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert "is a named pipe" in refused(folder)


def test_a_special_token_without_an_id_is_named(whole: Path, tmp_path: Path) -> None:
    """The library gives every other one an id."""
    folder = spoilt(whole, tmp_path, "tokenizer_config.json", put(bos_token=""))
    assert "the special token '' in" in refused(folder)


TEXTS = ("tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tools.jinja")


@pytest.mark.parametrize("file", TEXTS)
@pytest.mark.timeout(60)
def test_a_text_larger_than_any_real_one_is_told_and_not_read(whole: Path, tmp_path: Path, file: str) -> None:
    """A sparse file of 1 TiB takes no room on the disk; nor is a named pipe waited for."""
    folder = tmp_path / "spoilt"
    shutil.copytree(whole, folder)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    os.truncate(folder / file, 1 << 40)
    assert "has 1,099,511,627,776 bytes, 67,108,864 are allowed" in refused(folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert "is a named pipe" in refused(folder)


def test_code_beside_a_tokenizer_is_never_run(whole: Path, tmp_path: Path) -> None:
    named = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    folder = spoilt(whole, tmp_path, "tokenizer_config.json", put(**named))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    with pytest.raises(ConfigError):
        load_tokenizer(folder, "<image>")
    assert not (tmp_path / "ran").exists()


def test_a_panic_on_a_text_names_the_tokenizer(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the sentence at the start did not show; an end that somebody wishes is none."""

    class Panic(BaseException):
        pass

    tokenizer = load_tokenizer(whole, "<image>")
    stopping = Stopping(tokenizer, (), ("stop",))
    answers: dict[str, Any] = {"panic": Panic("index out of bounds"), "interrupt": KeyboardInterrupt()}

    def decode(*_: Any, **__: Any) -> None:
        raise answers["panic"]

    monkeypatch.setattr(type(tokenizer), "decode", decode)
    with pytest.raises(ConfigError, match=f"the tokenizer of '{whole}' fails on a text: index out of bounds"):
        stopping.text([5, 6])
    answers["panic"] = answers["interrupt"]
    with pytest.raises(KeyboardInterrupt):
        stopping.text([5, 6])
