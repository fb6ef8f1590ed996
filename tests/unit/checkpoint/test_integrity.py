"""A file that is not what was written is found and named, whichever rank reads it."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vlm.checkpoint.integrity import find_damage
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.errors import CheckpointError
from tests.helpers.models.checkpoints import a_checkpoint
from tests.helpers.ranks.solo import one_rank


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
