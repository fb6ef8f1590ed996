"""A manifest covers itself: no bit of it changes unseen, its entries have types and agree with what they are about."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.manifest import FORMAT, Manifest, OtherFormatError, _parse, _seal
from megatron_vlm.errors import CheckpointError
from tests.helpers.faults.spoiling import as_format, vouch_for_all
from tests.helpers.models.checkpoints import a_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    a_checkpoint(tmp_path / "step_0001250")
    return tmp_path / "step_0001250"


def test_every_flipped_bit_is_found(checkpoint: Path) -> None:
    """In white space, in the checksum itself, in the format's number, which would name another reader."""
    file = checkpoint / "manifest.json"
    content = file.read_bytes()
    assert json.loads(content)["format"] == FORMAT
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError) as caught:
            _parse(bytes(flipped), file)
        assert not isinstance(caught.value, OtherFormatError), "another format is no damage: a run would not fall back"
    for cut in range(len(content)):
        with pytest.raises(ValueError):
            _parse(content[:cut], file)
    file.write_bytes(content.replace(b'"format": 3', b'"format": 7'))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its own SHA-256, in its last lines"):
        Manifest.read(checkpoint)


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another step": (lambda m: m.update(step=1251), r"step: found 1251 in a directory called step_0001250"),
    "a negative step": (lambda m: m.update(step=-1), "step: found -1, needs a whole number from 0"),
    "no number": (lambda m: m.update(step=float("nan")), "step: found nan"),
    "a truth": (lambda m: m.update(step=True), "step: found True"),
    "a text": (lambda m: m.update(step="1250"), "step: found '1250'"),
    "a list": (lambda m: m.update(step=[]), "step: found a list"),
    "a step without end": (lambda m: m.update(step=10**30), "step: found 1000"),
    "a step as a fraction": (lambda m: m.update(step=1250.0), r"step: found 1250\.0"),
    "another recipe": (lambda m: m["config"].update(x=2), "config_hash: found [0-9a-f]{12}, which is not the hash"),
    "no recipe": (lambda m: m.update(config=[1]), "config: found a list, needs a recipe"),
    "components": (lambda m: m.update(components=["posix"]), "components: found a list"),
    "vocabulary": (lambda m: m.update(vocab_size=0), "vocab_size: found 0"),
    "layout": (lambda m: m["layout"].update(tensor="2"), "layout: found "),
    "no files": (lambda m: m.update(files={}), r"files: \.metadata is not listed"),
    "common.pt": (lambda m: m["files"].pop("common.pt"), "files: common.pt is not listed"),
    "backends": (lambda m: m["files"].pop("metadata.json"), "files: metadata.json is not listed"),
    "size as a text": (lambda m: m["files"].update(a=["1", "0" * 64]), "files: found "),
    "a negative size": (lambda m: m["files"].update(a=[-1, "0" * 64]), "files: found "),
    "hash in capitals": (lambda m: m["files"].update(a=[1, "A" * 64]), "files: found "),
    "a short record": (lambda m: m["files"].update(a=[1]), "files: found "),
    "a device": (lambda m: m["files"].update({"/dev/zero": [0, "0" * 64]}), "files: found '/dev/zero', needs the path"),
    "above": (lambda m: m["files"].update({"../../x": [0, "0" * 64]}), r"files: found '\.\./\.\./x'"),
    "in a circle": (lambda m: m["files"].update({"a/../b": [0, "0" * 64]}), "files: found 'a/../b'"),
    "null": (lambda m: m["files"].update({"a\0b": [0, "0" * 64]}), r"files: found 'a\\x00b'"),
    "itself": (lambda m: m["files"].update({"manifest.json": [0, "0" * 64]}), "files: found 'manifest.json'"),
    "missing": (lambda m: m.pop("layout"), "'layout': missing"),
    "one more": (lambda m: m.update({"\x1b]0;x\7": 1}), r"'\\x1b\]0;x\\x07': an unknown entry"),
    "format as a text": (lambda m: m.update(format="3"), "format: found '3'"),
    "a truth as a format": (lambda m: m.update(format=True), "format: found True"),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("number", [2, FORMAT])
def test_entries_have_types_and_agree(checkpoint: Path, name: str, number: int) -> None:
    """Whoever wrote it: the checksum of the manifest is that of what it says."""
    change, told = ENTRIES[name]
    file = checkpoint / "manifest.json"
    entries = json.loads(file.read_text())
    entries.pop("sha256")
    entries["format"] = number
    change(entries)
    file.write_bytes(written(entries) if number == FORMAT else json.dumps(entries).encode())
    with pytest.raises(CheckpointError, match=f"manifest.json is damaged: {told}") as caught:
        Manifest.read(checkpoint)
    assert len(str(caught.value).splitlines()) == 1


def written(entries: dict[str, Any]) -> bytes:
    """As `Manifest.write` does, whatever the entries."""
    content = json.dumps(entries, indent=1).encode().removesuffix(b"\n}") + b",\n"
    return content + _seal(content)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"step":' * 100_000, '{"step": 1' + "0" * 5000 + "}", "\udcff", "null"]
)
def test_what_is_no_manifest_is_one_line(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"manifest\.json (is damaged|cannot be read): ") as caught:
        Manifest.read(checkpoint)
    assert len(str(caught.value)) < 500 and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a directory"])
def test_no_other_kind_of_file_is_read(checkpoint: Path, kind: str) -> None:
    """Neither as the manifest, where a pipe would block for ever, nor as a file that it lists."""
    manifest = checkpoint / "manifest.json"
    manifest.unlink()
    {"a named pipe": os.mkfifo, "a device": lambda at: at.symlink_to("/dev/zero"), "a directory": os.mkdir}[kind](
        manifest
    )
    with pytest.raises(CheckpointError, match=f"cannot be read: is {kind}"):
        Manifest.read(checkpoint)


def test_the_recipe_of_any_keys_keeps_its_hash(tmp_path: Path) -> None:
    """JSON makes texts of numbers that are keys, and that sorts them otherwise."""
    from megatron_vlm.config.loading import config_hash, hash_of_tree
    from tests.helpers.ranks.solo import small_recipe

    recipe = small_recipe(language={"id2label": {10: "a", 9: "b"}, "rope_theta": 1e4, "x": [float("inf"), None, -0.0]})
    tree = json.loads(json.dumps(recipe.model_dump(mode="json")))
    assert hash_of_tree(tree) == config_hash(recipe)


def test_one_of_the_format_before_is_read_and_says_what_it_lacks(checkpoint: Path) -> None:
    as_format(checkpoint / "manifest.json", 2)
    manifest = Manifest.read(checkpoint)
    assert manifest.format == 2 and manifest.lacks == "it is of format 2: damage to its manifest is not found"
    manifest.write(checkpoint)
    assert Manifest.read(checkpoint).lacks is None
    vouch_for_all(checkpoint)
    assert Manifest.read(checkpoint).step == 1250
