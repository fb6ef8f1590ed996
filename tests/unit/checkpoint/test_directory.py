"""The directory of a run's checkpoints through kills at any point, and what is kept of it."""

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vlm.checkpoint import directory
from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.conversion.transfer.inspection import inspect
from megatron_vlm.errors import CheckpointError, ConfigError, MegatronVlmError
from tests.helpers.ranks.solo import one_rank


def write(root: Path, step: int, content: str = "x") -> Path:
    """A checkpoint ready to be published."""
    partial = directory.create_partial(directory.checkpoint_path(root, step))
    (partial / "part").write_text(content)
    (partial / "manifest.json").write_text('{"format": 0}')
    return partial


def publish(root: Path, step: int, content: str = "x") -> Path:
    final = directory.checkpoint_path(root, step)
    directory.publish(write(root, step, content), final)
    return final


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_the_newest_comes_first_and_nothing_else_counts(tmp_path: Path) -> None:
    for step in (2, 10_000_000, 4):
        publish(tmp_path, step)
    write(tmp_path, 6)
    (tmp_path / "step_0000008").write_text("a file")
    (tmp_path / "step_notes").mkdir()
    assert [directory.step_of(found) for found in directory.checkpoints(tmp_path)] == [10_000_000, 4, 2]
    assert (tmp_path / "latest").read_text() == "step_0000004"
    assert directory.checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    publish(tmp_path, 2, "old")
    assert (publish(tmp_path, 2, "new") / "part").read_text() == "new"
    assert names(tmp_path) == {"step_0000002", "latest"}


@pytest.mark.parametrize("killed_before", ["rename", "rmtree", "replace"])
def test_killed_while_replacing(tmp_path: Path, killed_before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the last thing was that the killed process did, one of the two checkpoints is there after the next
    start, whole."""
    publish(tmp_path, 2, "old")
    calls = 0

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    def kill_at_second_call(*arguments: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        original = directory.os.rename
        if killed_before == "rename":
            patch.setattr(directory.os, "rename", kill_at_second_call)
        else:
            patch.setattr(directory.shutil if killed_before == "rmtree" else directory.os, killed_before, kill)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, 2, "new")
    directory.tidy(tmp_path)
    (found,) = directory.checkpoints(tmp_path)
    assert (found / "part").read_text() == ("old" if killed_before == "rename" else "new")
    assert (tmp_path / "latest").read_text() == found.name
    assert not [name for name in names(tmp_path) if name.startswith((".partial_", ".replaced_", ".removed_"))]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        publish(tmp_path, step)
    retired = directory.retire_all_but(tmp_path, 2)
    assert {path.name for path in retired} == {".removed_step_0000002", ".removed_step_0000004"}
    assert [found.name for found in directory.checkpoints(tmp_path)] == ["step_0000008", "step_0000006"]


def test_one_that_was_being_removed_is_no_checkpoint(tmp_path: Path) -> None:
    publish(tmp_path, 2)
    publish(tmp_path, 4)
    (retired,) = directory.retire_all_but(tmp_path, 1)
    (retired / "part").unlink()  # killed halfway
    assert [found.name for found in directory.checkpoints(tmp_path)] == ["step_0000004"]
    directory.tidy(tmp_path)
    assert names(tmp_path) == {"step_0000004", "latest"}


def test_a_damaged_one_is_out_of_the_way(tmp_path: Path) -> None:
    for step in (2, 4):
        publish(tmp_path, step)
    for content in ("first", "second"):  # damaged twice
        directory.set_aside(publish(tmp_path, 6, content))
    directory.retire_all_but(tmp_path, 1)
    assert names(tmp_path) == {".removed_step_0000002", "step_0000004", "damaged_step_0000006", "latest"}
    assert (tmp_path / "damaged_step_0000006" / "part").read_text() == "second"


def test_what_goes_wrong_on_rank_zero_is_an_error_everywhere() -> None:
    def refuse() -> None:
        raise CheckpointError("of its own")

    def full() -> None:
        raise OSError(28, "No space left on device")

    with one_rank():
        world = dist.group.WORLD
        assert world is not None
        assert directory.on_rank_zero(lambda: 7, world, "saving") == 7
        with pytest.raises(CheckpointError, match="^of its own$"):
            directory.on_rank_zero(refuse, world, "saving")
        with pytest.raises(CheckpointError, match=r"^saving: .*No space left"):
            directory.on_rank_zero(full, world, "saving")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"../elsewhere/step_0000002", "found '../elsewhere/step_0000002', needs the name of a checkpoint beside it"),
        (b"/etc", "found '/etc', needs the name"),
        (b"..", "found '..', needs the name"),
        (b"", "found '', needs the name"),
        (b"a\0b", r"found 'a\\x00b', needs the name"),
        (b"step_0000002/../../elsewhere/step_0000002", "needs the name"),
        ("step_\u0662".encode(), "needs the name"),
        (b"\xff\xfe", "cannot be read: is not UTF-8"),
        (b"x" * 100_000, "cannot be read: has more than the 256 bytes"),
        ("link", r"found step_0000009, which is a link to .*/elsewhere/step_0000002; needs what lies beside it"),
        ("loop", "is not a directory|found no weights"),
        ("pipe", "cannot be read: is a named pipe"),
        ("directory", "cannot be read: is a directory"),
    ],
)
def test_latest_names_a_checkpoint_beside_it_and_nothing_else(tmp_path: Path, content: bytes | str, told: str) -> None:
    root, pointer = tmp_path / "run", tmp_path / "run" / "latest"
    publish(tmp_path / "elsewhere", 2)
    publish(root, 2)
    pointer.unlink()
    match content:
        case bytes():
            pointer.write_bytes(content)
        case "link" | "loop":
            pointer.write_text("step_0000009")
            (root / "step_0000009").symlink_to(
                tmp_path / "elsewhere/step_0000002" if content == "link" else root / "step_0000009"
            )
        case "pipe":
            os.mkfifo(pointer)
        case "directory":
            pointer.mkdir()
    for read in (find_checkpoint, inspect):
        with pytest.raises(MegatronVlmError, match=told) as caught:
            read(root)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def test_names_are_of_ascii_digits(tmp_path: Path) -> None:
    publish(tmp_path, 2)
    (tmp_path / "step_\u0663").mkdir()
    assert [found.name for found in directory.checkpoints(tmp_path)] == ["step_0000002"]


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    publish(tmp_path, 2)
    with pytest.raises((CheckpointError, ConfigError), match="format 0 found, this version reads formats 2 and 3"):
        find_checkpoint(tmp_path)


def test_a_whole_checkpoint_is_not_told_as_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `latest` cannot be moved, or what it replaces not removed; it is there, and found, all the same."""
    first = publish(tmp_path, 1)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match=r"step_0000002 is whole, but \S*latest could not be moved to it: .*"):
        publish(tmp_path, 2)
    assert directory.checkpoints(tmp_path) == [tmp_path / "step_0000002", first]
    (tmp_path / "latest").rmdir()
    remove = shutil.rmtree

    def refuse(path: Path, *args: object) -> None:
        if Path(path).name == ".replaced_step_0000002":
            raise PermissionError(13, "Permission denied")
        remove(path)

    monkeypatch.setattr(directory.shutil, "rmtree", refuse)
    with pytest.raises(CheckpointError, match="step_0000002 is whole, but .*_step_0000002, which it replaces, "):
        publish(tmp_path, 2, "y")
    assert directory.latest_of(tmp_path) == tmp_path / "step_0000002"
