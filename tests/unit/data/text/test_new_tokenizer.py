"""A tokenizer of one's own texts, and the command that makes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.data.text.new_tokenizer import make_tokenizer
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError, DataError
from tests.helpers.ranks.processes import ROOT, environment

IMAGE = "<image>"


def write_data(path: Path, *texts: str, spoiled: bool = False) -> Path:
    turns = [{"from": "human", "value": f"{IMAGE}\n{texts[0]}"}, {"from": "gpt", "value": texts[-1]}]
    records: list[object] = [{"id": "1", "image": "a.png", "conversations": turns}]
    path.write_text(json.dumps([*records, *([{"id": "2"}] if spoiled else [])]))
    return path


def test_its_own_words_are_short_and_every_text_comes_back(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.json", "zyzzyva zyzzyva zyzzyva", "quokka quokka", spoiled=True)
    made = make_tokenizer(data, tmp_path / "it", 300)
    tokenizer = load_tokenizer(tmp_path / "it", IMAGE)
    assert 259 < made == len(tokenizer) <= 300
    assert len(tokenizer.encode(" zyzzyva")) < len(tokenizer.encode(" zqxjkvb"))
    for text in (" zyzzyva", "Grüße, 你好 🙂\n\t x", "<b> &amp;"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(IMAGE) == 2  # and no piece of a word, though records hold it


@pytest.mark.parametrize(
    ("size", "directory", "data", "error", "message"),
    [
        (258, "new", "d.json", ConfigError, "--vocabulary-size: found 258, needs at least 259"),
        (300, "there", "d.json", ConfigError, "exists already, needs a new directory"),
        (300, "d.json/new", "d.json", ConfigError, "d.json/new: cannot be written"),
        (300, "new", "none.json", DataError, "cannot be read"),
        (300, "new", "useless.json", DataError, "found no record that can be used"),
    ],
)
def test_what_it_refuses(
    tmp_path: Path, size: int, directory: str, data: str, error: type[Exception], message: str
) -> None:
    write_data(tmp_path / "d.json", "a", "b")
    (tmp_path / "useless.json").write_text('[{"id": "2"}]')
    (tmp_path / "there").mkdir()
    with pytest.raises(error, match=message):
        make_tokenizer(tmp_path / data, tmp_path / directory, size)
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.json", "what is this?", "a thing")
    command = [sys.executable, str(ROOT / "tools" / "data.py"), "tokenizer", str(data), str(tmp_path / "it")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/it: {len(load_tokenizer(tmp_path / 'it', IMAGE)):,} tokens\n"
