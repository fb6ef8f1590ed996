"""A file that is not what was written is found and named, whichever rank reads it."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vlm.checkpoint.integrity import find_damage, records_of
from megatron_vlm.checkpoint.manifest import ALWAYS_THERE, Manifest
from megatron_vlm.config.loading import hash_of_tree
from megatron_vlm.errors import CheckpointError
from tests.helpers.solo import one_rank


def a_checkpoint(directory: Path) -> Manifest:
    """Files, one of them empty, and their manifest; the step is the directory's, where its name says one."""
    (directory / "tokenizer").mkdir(parents=True)
    files = {"a": b"weights" * 1000, "tokenizer/t.json": b"{}", "empty": b""}
    files |= {name: b"not read here" for name in ALWAYS_THERE}
    step = int(directory.name.removeprefix("step_"))
    for name, content in files.items():
        (directory / name).write_bytes(content)
    records = records_of(directory, [directory / name for name in files])
    manifest = Manifest(
        step=step, config={"x": 1}, config_hash=hash_of_tree({"x": 1}), components=["language"], vocab_size=8,
        layout={"tensor": 1}, data_fingerprint={"samples": 1}, files=records,
    )  # fmt: skip
    manifest.write(directory)
    return manifest


@pytest.mark.parametrize(
    ("damage", "story"),
    [
        ("nothing", None),
        ("flip", "a is not what was saved: its SHA-256 differs from the manifest's"),
        ("cut", "a has 6999 bytes, it was saved with 7000"),
        ("lose", "tokenizer/t.json is missing"),
        ("fill", "empty has 1 bytes, it was saved with 0"),
        ("replace", "tokenizer/t.json cannot be read: is a directory, a regular file is needed"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: str, story: str | None) -> None:
    manifest = a_checkpoint(tmp_path / "step_1")
    first = tmp_path / "step_1" / "a"
    match damage:
        case "flip":
            content = bytearray(first.read_bytes())
            content[4321] ^= 1
            first.write_bytes(content)
        case "cut":
            first.write_bytes(first.read_bytes()[:-1])
        case "lose":
            (tmp_path / "step_1" / "tokenizer" / "t.json").unlink()
        case "fill":
            (tmp_path / "step_1" / "empty").write_bytes(b"1")
        case "replace":
            name = "tokenizer/t.json"
            (tmp_path / "step_1" / name).unlink()
            (tmp_path / "step_1" / name).mkdir()
            size = (tmp_path / "step_1" / name).stat().st_size
            manifest.files[name] = manifest.files[name]._replace(size_bytes=size)
    with one_rank():
        world = dist.group.WORLD
        assert world is not None
        assert find_damage(tmp_path / "step_1", manifest, world) == story


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = a_checkpoint(tmp_path / "step_1")
    assert Manifest.read(tmp_path / "step_1") == manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "files": {"a": [1, 2, 3]}}'])
def test_a_manifest_that_is_none_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        Manifest.read(tmp_path)
