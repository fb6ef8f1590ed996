"""Pickles of a native checkpoint are read as data: planted code is named and never runs, lies are told."""

import dataclasses
import io
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_vlm.checkpoint import stored_entries
from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.reading import _CommonStrategy
from megatron_vlm.checkpoint.stored_metadata import read_metadata
from megatron_vlm.errors import CheckpointError
from tests.helpers.faults import hostile_pickles
from tests.helpers.faults.hostile_pickles import OPCODES, Opcodes, Planter, planted, set_attribute, text

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process is meant


class Code:
    """Pickled, it is a call that makes a directory when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def read(checkpoint: Path) -> Metadata:
    """What the checkpoint says, of the files as they are."""
    return read_metadata(checkpoint, records_of(checkpoint, checkpoint.glob("*.distcp")))


def in_metadata(directory: Path, code: Any) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = code
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What torch writes for tensors of several number formats and an object, and megatron-core's common.pt."""
    tensors = {str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    tensors |= {"scalar": torch.tensor(1.0), "long" * 80: torch.zeros(70000, 1)}
    torch_checkpoint.save({**tensors, "extra": io.BytesIO(b"state")}, checkpoint_id=tmp_path / "step", no_dist=True)
    torch.save({"optimizer": {"lr": 0.5, "betas": (0.9, 0.99)}}, tmp_path / "step" / "common.pt")
    return tmp_path / "step"


def test_the_names_that_are_read_without_torch_are_torchs() -> None:
    known = {str(kind).removeprefix("torch.") for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
    assert known <= set(stored_entries.DTYPES)
    assert set(stored_entries._ENUMS.values()) == {(*_MEM_FORMAT_ENCODING.__members__,), (*WriteItemType.__members__,)}
    contiguous = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert stored_entries.CONTIGUOUS == (contiguous.name, contiguous.value)


def test_a_dtype_that_this_torch_lacks_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "bfloat16")
    with pytest.raises(CheckpointError, match="torch.bfloat16 is of dtype bfloat16, which torch .* lacks"):
        read(checkpoint)


def test_data_passes_and_is_what_torch_reads(checkpoint):
    found, plain = read(checkpoint), torch_checkpoint.FileSystemReader(checkpoint).read_metadata()
    assert found.state_dict_metadata == plain.state_dict_metadata and found.storage_data == plain.storage_data
    assert [index.index for index in found.storage_data] == [index.index for index in plain.storage_data]
    assert _CommonStrategy().load_common(checkpoint) == {"optimizer": {"lr": 0.5, "betas": (0.9, 0.99)}}


class Attribute:
    """Pickled, it is an attribute asked for when it is read, as Python 3.11.2 pickles the member of an enum."""

    def __init__(self, of: object, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_members_of_enums_pass_in_the_words_of_every_python(checkpoint):
    in_metadata(checkpoint, Attribute(WriteItemType, "TENSOR"))
    read(checkpoint)
    content, value = (checkpoint / ".metadata").read_bytes(), b"K\x00\x85\x94R"
    assert value in content, "how this Python pickles a memory format"
    name = text("builtins") + text("getattr") + pickle.STACK_GLOBAL
    of = hostile_pickles.name(hostile_pickles.METADATA, "_MEM_FORMAT_ENCODING")
    member = name + of + text("TORCH_CONTIGUOUS_FORMAT") + pickle.TUPLE2 + pickle.REDUCE
    metadata = pickle.loads(content)
    for entry in metadata.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            state = list(entry.properties.__getstate__())
            state[3] = Opcodes(lambda pickler: member)
            entry.properties = WithState(entry.properties, tuple(state))
    (checkpoint / ".metadata").write_bytes(planted(metadata))
    assert read(checkpoint).state_dict_metadata == pickle.loads(content).state_dict_metadata


class WithState:
    """Pickled, it is an instance of another's class with that state."""

    def __init__(self, like: object, state: Any) -> None:
        self.like, self.state = like, state

    def __reduce_ex__(self, protocol):
        return type(self.like), (), self.state


@pytest.mark.parametrize(("of", "name"), [(WriteItemType, "__class__"), (Metadata, "__init__"), ("text", "upper")])
def test_no_other_attribute_passes(checkpoint, of, name):
    in_metadata(checkpoint, Attribute(of, name))
    with pytest.raises(CheckpointError, match=r"\.metadata would run builtins\.getattr"):
        read(checkpoint)


def test_code_is_named_and_does_not_run(checkpoint, tmp_path):
    in_metadata(checkpoint, Code(tmp_path / "ran"))
    torch.save({"optimizer": Code(tmp_path / "ran")}, checkpoint / "common.pt")
    for file, load in ((".metadata", read), ("common.pt", _CommonStrategy().load_common)):
        with pytest.raises(CheckpointError) as caught:
            load(checkpoint)
        assert str(caught.value).startswith(f"{checkpoint / file} would run posix.mkdir when it is loaded")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", OPCODES)
def test_no_opcode_has_an_effect(checkpoint, kind):
    """None of them changes a class or a function, takes memory for what is not there, or passes."""
    before = {kind: dict(vars(kind)) for kind in (MetadataIndex, _StorageInfo, BytesStorageMetadata, WriteItemType)}
    in_place, content = Opcodes(lambda pickler: OPCODES[kind]), (checkpoint / ".metadata").read_bytes()
    metadata = pickle.loads(content)
    metadata.planner_data = in_place
    (checkpoint / ".metadata").write_bytes(planted(metadata))
    with pytest.raises(CheckpointError) as caught:
        read(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint}/.metadata ") and "\n" not in str(caught.value)
    assert {kind: dict(vars(kind)) for kind in before} == before


def test_an_instance_is_not_changed_after_it_was_used(checkpoint):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    key = next(iter(metadata.storage_data))
    late = Opcodes(lambda pickler: set_attribute(pickler.again(key), "fqn", text("extra")))
    ordered = Metadata(metadata.state_dict_metadata, storage_data=metadata.storage_data, version=late)
    (checkpoint / ".metadata").write_bytes(planted(ordered))
    with pytest.raises(CheckpointError, match=r"changes a torch\S*MetadataIndex after it was made"):
        read(checkpoint)


def test_a_name_may_not_hide_behind_an_allowed_module(checkpoint):
    hidden = text("torch.distributed.checkpoint.filesystem") + text("os.system") + pickle.STACK_GLOBAL
    (checkpoint / ".metadata").write_bytes(pickle.PROTO + b"\x04" + hidden + pickle.STOP)
    with pytest.raises(CheckpointError, match=r"would run torch\.distributed\.checkpoint\.filesystem\.os\.system"):
        read(checkpoint)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_old_protocols_are_refused(checkpoint, protocol):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(CheckpointError, match="not a pickle of protocol 4 or 5"):
        read(checkpoint)


def of_the_scalar(**fields: Any) -> Callable[[Metadata], None]:
    """Another place of a tensor."""

    def lie(metadata: Metadata) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == "scalar")
        metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **fields)

    return lie


def of_the_long(**fields: Any) -> Callable[[Metadata], None]:
    """Another shape of a tensor."""
    return lambda metadata: metadata.state_dict_metadata["long" * 80].__dict__.update(fields)


def without_a_place(metadata: Metadata) -> None:
    metadata.storage_data.popitem()


def a_place_of_nothing(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("nothing")] = _StorageInfo("__0_0.distcp", 0, 1)


def an_entry_twice(metadata: Metadata) -> None:
    metadata.state_dict_metadata = Twice(metadata.state_dict_metadata)


def a_place_twice(metadata: Metadata) -> None:
    metadata.storage_data = Twice(metadata.storage_data)


class Twice(dict):
    """Pickled, a dictionary that says its first pair again."""

    def __reduce_ex__(self, protocol):
        return dict, (), None, None, iter([*self.items(), next(iter(self.items()))])


SIZE_OF_TRUTHS = hostile_pickles.name("torch", "Size") + pickle.NEWTRUE * 2 + pickle.TUPLE2 + b"\x85R"
LIES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a path out": (of_the_scalar(relative_path="../x.distcp"), "names a part '../x.distcp', which the manifest does"),
    "an absolute path": (of_the_scalar(relative_path="/etc/passwd"), "names a part '/etc/passwd'"),
    "a path below": (of_the_scalar(relative_path="a/__0_0.distcp"), "names a part"),
    "another name of the part": (of_the_scalar(relative_path="./__0_0.distcp"), "names a part"),
    "no text as a path": (of_the_scalar(relative_path=("a",)), "names a part"),
    "before its file": (of_the_scalar(offset=-1), "outside its file"),
    "after its file": (of_the_scalar(length=1 << 62), "outside its file"),
    "a truth as a place": (of_the_scalar(offset=True), "outside its file"),
    "transforms": (of_the_scalar(transform_descriptors=["zstd"]), "a field that torch does not write"),
    "one entry of no place": (without_a_place, "does not say where"),
    "a place of no entry": (a_place_of_nothing, "is not among its entries"),
    "an entry twice": (an_entry_twice, "GLOBAL|dict"),
    "a place twice": (a_place_twice, "GLOBAL|dict"),
    "a negative size": (of_the_long(size=(-1, 1)), "writes a size"),
    "a size of truths": (of_the_long(size=Opcodes(lambda pickler: SIZE_OF_TRUTHS)), "a size that is none"),
    "elements without number": (of_the_long(size=torch.Size([1 << 62, 1 << 62]), chunks=[]), "too large"),
    "chunks outside": (
        of_the_long(chunks=[ChunkStorageMetadata(torch.Size([70000, 0]), torch.Size([1, 1]))]),
        "a chunk outside its tensor",
    ),
    "chunks of other dimensions": (
        of_the_long(chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))]),
        "a chunk outside its tensor",
    ),
    "no chunks": (of_the_long(chunks=None), "not in chunks"),
    "no properties": (of_the_long(properties=None), "not a plain one|writes a"),
    "one field more": (of_the_long(more=1), "a field that torch does not write"),
    "another version of it": (lambda metadata: metadata.__dict__.update(more=1), "a field that torch does not write"),
    "no places": (lambda metadata: metadata.__dict__.update(storage_data=None), "writes a dictionary"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_told(checkpoint, lie):
    change, told = LIES[lie]
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(planted(metadata))
    with pytest.raises(CheckpointError, match=told) as caught:
        read(checkpoint)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_nested_or_shared_without_end_is_not_walked_through(checkpoint):
    """Neither depth, which ends C's stack, nor tuples of shared tuples, whose hash takes time without end."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    start = time.process_time()

    def as_key(nest: bytes) -> bytes:
        return pickle.EMPTY_DICT + nest + pickle.NONE + pickle.SETITEM

    def wide(pickler: Planter) -> bytes:
        places = range(len(pickler.memo), len(pickler.memo) + 60)
        twice = (pickle.MEMOIZE + pickle.LONG_BINGET + place.to_bytes(4, "little") + pickle.TUPLE2 for place in places)
        return as_key(pickle.EMPTY_TUPLE + b"".join(twice))

    deep = Opcodes(lambda pickler: as_key(pickle.EMPTY_TUPLE + pickle.TUPLE1 * 500_000))
    for field in ({"planner_data": deep}, {"version": Opcodes(wide)}):  # nobody asks for these
        (checkpoint / ".metadata").write_bytes(planted(dataclasses.replace(metadata, **field)))
        read(checkpoint)
    (checkpoint / ".metadata").write_bytes(planted(dataclasses.replace(metadata, state_dict_metadata=deep)))
    with pytest.raises(CheckpointError, match="by a tuple"):
        read(checkpoint)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(("file", "load"), [(".metadata", read), ("common.pt", _CommonStrategy().load_common)])
def test_damage_is_named(checkpoint, file, load):
    path = checkpoint / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=f"{file} is damaged: "):
        load(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: No such file"):
        load(checkpoint)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: is a named pipe"):
        load(checkpoint)


def test_another_object_in_the_metadata_is_told(checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: it holds a list"):
        read(checkpoint)
