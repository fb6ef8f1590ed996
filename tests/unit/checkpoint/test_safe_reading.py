"""Pickles of a native checkpoint are read as data: planted code is named and never runs."""

import dataclasses
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_vlm.checkpoint.safe_reading import refuse_code
from megatron_vlm.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process is meant


class Code:
    """Pickled, it is a call that makes a directory when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def in_metadata(directory: Path, code: Code) -> str:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = code
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".metadata"


def in_common(directory: Path, code: Code) -> str:
    torch.save({"optimizer": code}, directory / "common.pt")
    return "common.pt"


def in_an_object(directory: Path, code: Code) -> str:
    """Behind the file's own bytes, with `.metadata` pointing there."""
    written = io.BytesIO()
    torch.save(code, written)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    place, stored = next((place, stored) for place, stored in metadata.storage_data.items() if place.fqn == "extra")
    file = directory / stored.relative_path
    end = file.stat().st_size
    file.write_bytes(file.read_bytes() + written.getvalue())
    metadata.storage_data[place] = dataclasses.replace(stored, offset=end, length=len(written.getvalue()))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return stored.relative_path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What torch writes for tensors of several number formats and an object, and megatron-core's common.pt."""
    tensors = {str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    torch_checkpoint.save({**tensors, "extra": io.BytesIO(b"state")}, checkpoint_id=tmp_path / "step", no_dist=True)
    torch.save({"optimizer": {"lr": 0.5, "betas": (0.9, 0.99)}}, tmp_path / "step" / "common.pt")
    return tmp_path / "step"


def test_data_passes(checkpoint):
    refuse_code(checkpoint)


class Attribute:
    """Pickled, it is an attribute asked for when it is read, as Python 3.11.2 pickles the member of an enum."""

    def __init__(self, of: object, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_members_of_enums_pass_in_the_words_of_every_python(checkpoint):
    in_metadata(checkpoint, Attribute(WriteItemType, "TENSOR"))
    refuse_code(checkpoint)


@pytest.mark.parametrize(("of", "name"), [(WriteItemType, "__class__"), (Metadata, "__init__"), ("text", "upper")])
def test_no_other_attribute_passes(checkpoint, of, name):
    in_metadata(checkpoint, Attribute(of, name))
    with pytest.raises(CheckpointError, match=r"\.metadata would run builtins\.getattr"):
        refuse_code(checkpoint)


@pytest.mark.parametrize("plant", [in_metadata, in_common, in_an_object])
def test_code_is_named_and_does_not_run(checkpoint, tmp_path, plant):
    file = plant(checkpoint, Code(tmp_path / "ran"))
    with pytest.raises(CheckpointError) as caught:
        refuse_code(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / file} would run posix.mkdir when it is loaded")
    assert not (tmp_path / "ran").exists()


def test_the_planted_code_runs_where_nothing_refuses_it(checkpoint, tmp_path):
    in_metadata(checkpoint, Code(tmp_path / "metadata"))
    torch_checkpoint.FileSystemReader(checkpoint).read_metadata()
    (tmp_path / "metadata").rmdir()
    in_an_object(checkpoint, Code(tmp_path / "object"))  # its metadata holds the former code's result now
    torch_checkpoint.load({"extra": io.BytesIO()}, checkpoint_id=checkpoint, no_dist=True)
    assert (tmp_path / "object").is_dir()


def test_a_name_may_not_hide_behind_an_allowed_module(checkpoint):
    module, name = b"torch.distributed.checkpoint.filesystem", b"os.system"
    text = b"".join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part for part in (module, name))
    (checkpoint / ".metadata").write_bytes(pickle.PROTO + b"\x04" + text + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(CheckpointError, match="would run torch.distributed.checkpoint.filesystem.os.system"):
        refuse_code(checkpoint)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_damage_is_told_with_the_file(checkpoint, file):
    path = checkpoint / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=f"{file} is damaged: "):
        refuse_code(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: No such file"):
        refuse_code(checkpoint)


def test_another_object_in_the_metadata_is_told(checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: it holds a list"):
        refuse_code(checkpoint)
