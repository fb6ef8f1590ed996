"""Checkpoints of an attacker, through the real loader: every checksum is right, it is the attacker's; no code runs."""

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.distributed.checkpoint.metadata import MetadataIndex

import megatron_vlm
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.errors import CheckpointError
from tests.helpers.faults.hostile_pickles import (
    ALWAYS_TRUE,
    INDEX,
    METADATA,
    PLANNER,
    Opcodes,
    planted,
    set_attribute,
    text,
)
from tests.helpers.faults.spoiling import Code, as_format, vouch_for_all
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.jobs import save
from tests.helpers.ranks.warm import run_warm

TENSOR = "language.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.distributed import Launch, init_world, teardown
    from megatron_vlm.training.job import build_job

    recipe = tiny_recipe(tmp_path_factory.mktemp("saved"), checkpoint={"async_save": False})
    init_world(Launch(), prepare("cpu"), 60)
    try:
        yield save(build_job(recipe, 1), 1)
    finally:
        teardown()


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "job" / "checkpoints" / "step_0000001"))


def with_code(checkpoint: Path, code: Any) -> tuple[Any, MetadataIndex]:
    """The metadata, where an object's place is that of code behind the tensors; and that object's key."""
    written = io.BytesIO()
    torch.save(code, written)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    victim = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    place = metadata.storage_data[victim]
    file = checkpoint / place.relative_path
    metadata.storage_data[victim] = dataclasses.replace(place, offset=file.stat().st_size, length=written.tell())
    file.write_bytes(file.read_bytes() + written.getvalue())
    return metadata, victim


def confused(checkpoint: Path, code: Code, protocol: int) -> str:
    """F1 of the attack on this project: keys that compare as equal, and one that is renamed after it was used. A check
    of what was read takes the object for a tensor; torch's planner finds it by its hash, and loads it as an object."""
    metadata, victim = with_code(checkpoint, code)
    if protocol < 4:
        old = b"c" + METADATA.encode() + b"\nMetadataIndex\n"
        true = b"c" + PLANNER.encode() + b"\nBytesIOWriteData\n"
        name = b"X" + len(TENSOR).to_bytes(4, "little") + TENSOR.encode()

        def late(pickler: Any) -> bytes:
            compared = old + b"N}X\6\0\0\0__eq__" + true + b"s\x86b0"
            return compared + pickler.again(victim) + b"}X\3\0\0\0fqn" + name + b"sb"
    else:

        def late(pickler: Any) -> bytes:
            compared = set_attribute(INDEX, "__eq__", ALWAYS_TRUE) + pickle.POP
            return compared + pickler.again(victim) + b"}" + text("fqn") + text(TENSOR) + b"sb"

    metadata.version = Opcodes(late)
    (checkpoint / ".metadata").write_bytes(planted(metadata, protocol))
    return r"\.metadata is damaged: its? "


def in_an_object(checkpoint: Path, code: Code) -> str:
    metadata, _ = with_code(checkpoint, code)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return r"__0_0\.distcp would run posix\.mkdir when it is loaded"


class Stateful:
    """Unpickled, it runs code of a class that is there already."""

    def __init__(self, code: Code) -> None:
        self.marker = str(code.marker)

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.mkdir(state["marker"])


def in_an_object_with_state(checkpoint: Path, code: Code) -> str:
    in_an_object(checkpoint, Stateful(code))
    return r"__0_0\.distcp would run tests\.unit\.checkpoint\.test_hostile\.Stateful"


def in_common(checkpoint: Path, code: Code) -> str:
    torch.save({"optimizer": Stateful(code)}, checkpoint / "common.pt")
    return r"common\.pt would run tests\.unit\.checkpoint\.test_hostile\.Stateful"


def in_a_tensor(checkpoint: Path, code: Code) -> str:
    """Where a tensor lies, by an honest pickle."""
    metadata, victim = with_code(checkpoint, code)
    tensor = next(index for index in metadata.storage_data if index.fqn == TENSOR)
    metadata.storage_data[tensor] = metadata.storage_data[victim]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return r"step_0000001 would run posix\.mkdir when it is loaded"


def as_a_tensor(checkpoint: Path, code: Code) -> str:
    """An object that is said to be a tensor."""
    metadata, victim = with_code(checkpoint, code)
    metadata.state_dict_metadata[victim.fqn] = dataclasses.replace(metadata.state_dict_metadata[TENSOR])
    chunk = metadata.state_dict_metadata[TENSOR].chunks[0].offsets
    metadata.storage_data[MetadataIndex(victim.fqn, chunk)] = metadata.storage_data.pop(victim)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return rf"cannot be loaded into this model: 1 tensors only in the checkpoint: {victim.fqn}"


def as_an_object(checkpoint: Path, code: Code) -> str:
    """A tensor that is said to be an object."""
    metadata, victim = with_code(checkpoint, code)
    metadata.state_dict_metadata[TENSOR] = metadata.state_dict_metadata[victim.fqn]
    tensor = next(index for index in metadata.storage_data if index.fqn == TENSOR)
    del metadata.storage_data[tensor]
    metadata.storage_data[MetadataIndex(TENSOR)] = metadata.storage_data[victim]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return "is not the name of one"


def outside(checkpoint: Path, code: Code) -> str:
    """A part that lies elsewhere."""
    metadata, victim = with_code(checkpoint, code)
    shutil.copy(checkpoint / "__0_0.distcp", checkpoint.parent / "other.distcp")
    metadata.storage_data[victim] = dataclasses.replace(metadata.storage_data[victim], relative_path="../other.distcp")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return r"names a part '\.\./other\.distcp', which the manifest does not list"


def by_another_backend(checkpoint: Path, code: Code) -> str:
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')
    return "names the backend 'zarr', 'torch_dist' is needed"


ATTACKS: dict[str, Callable[[Path, Code], str]] = {
    "F1": lambda checkpoint, code: confused(checkpoint, code, protocol=2),
    "F1 in today's protocol": lambda checkpoint, code: confused(checkpoint, code, protocol=4),
    **{
        attack.__name__.replace("_", " "): attack
        for attack in (
            in_an_object, in_an_object_with_state, in_common, in_a_tensor, as_a_tensor, as_an_object, outside,
            by_another_backend,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_a_checkpoint_runs(checkpoint: Path, attack: str) -> None:
    code = Code(checkpoint.parents[1])
    told = ATTACKS[attack](checkpoint, code)
    vouch_for_all(checkpoint)
    with pytest.raises(CheckpointError, match=told) as caught:
        megatron_vlm.load(checkpoint)
    assert len(str(caught.value).splitlines()) == 1 and str(checkpoint) in str(caught.value)
    assert not code.marker.exists()


def read_unguarded(folder: str, name: str) -> None:
    """Reads a checkpoint as torch and megatron-core do by themselves, up to where an attack stops it."""
    with contextlib.suppress(Exception):
        torch.load(Path(folder) / "common.pt", weights_only=False)
        place = pickle.loads((Path(folder) / ".metadata").read_bytes()).storage_data[MetadataIndex(name)]
        with open(Path(folder) / place.relative_path, "rb") as file:
            file.seek(place.offset)
            torch.load(io.BytesIO(file.read(place.length)), weights_only=False)


@pytest.mark.parametrize(
    "attack", ["F1", "F1 in today's protocol", "in an object", "in an object with state", "in common"]
)
def test_the_code_would_run_where_nothing_refuses_it(checkpoint: Path, attack: str) -> None:
    """An attack that has gone blunt proves nothing."""
    victim = next(
        index.fqn
        for index in pickle.loads((checkpoint / ".metadata").read_bytes()).storage_data
        if "_extra_state" in index.fqn
    )
    code = Code(checkpoint.parents[1])
    ATTACKS[attack](checkpoint, code)
    run_warm(read_unguarded, str(checkpoint), victim)
    assert code.marker.exists()


@pytest.mark.parametrize("kind", ["object", "tensor"])
def test_damaged_bytes_of_a_part_are_told_with_it(checkpoint: Path, kind: str) -> None:
    """Whoever damaged them made the checksums anew."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(one for one in metadata.storage_data if (one.fqn == TENSOR) == (kind == "tensor") and (
        kind == "tensor" or "_extra_state" in one.fqn))  # fmt: skip
    place = metadata.storage_data[index]
    content = bytearray((checkpoint / place.relative_path).read_bytes())
    content[place.offset : place.offset + place.length] = b"\xff" * place.length
    (checkpoint / place.relative_path).write_bytes(content)
    vouch_for_all(checkpoint)
    told = r"__0_0\.distcp is damaged" if kind == "object" else r"step_0000001 (is damaged|cannot be loaded)"
    with pytest.raises(CheckpointError, match=told) as caught:
        megatron_vlm.load(checkpoint)
    assert len(str(caught.value).splitlines()) == 1 and "weights_only" not in str(caught.value)


def test_an_unlisted_file_is_not_read_and_no_trouble(checkpoint: Path) -> None:
    (checkpoint / "__9_0.distcp").write_bytes(b"not of it")
    (checkpoint / "tokenizer" / ".hidden").write_text("left by a file system")
    assert megatron_vlm.load(checkpoint).model is not None
    (checkpoint / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds tokenizer/added_tokens\.json, which its manifest does not list"):
        megatron_vlm.load(checkpoint)


def test_one_of_the_format_before_trains_answers_and_is_exported(saved: Path, checkpoint: Path, tmp_path: Path) -> None:
    """As the version before this one wrote it: the same weights and states, wherever they go."""
    as_format(checkpoint / "manifest.json", 2)
    weights = {}
    for directory in (saved, checkpoint):
        assistant = megatron_vlm.load(directory)
        weights[directory] = {name: p.detach().clone() for name, p in assistant.model.named_parameters()}
        plan_export(directory).write(tmp_path / f"hf_{len(weights)}")
    assert all(torch.equal(weights[saved][name], tensor) for name, tensor in weights[checkpoint].items())
    one, two = ((tmp_path / f"hf_{number}" / "model.safetensors").read_bytes() for number in (1, 2))
    assert one == two
    job = a_job(saved, load=str(checkpoint))
    assert job.start is not None and job.start.directory == checkpoint and job.start_step == 1


def a_job(saved: Path, **keys: Any) -> Any:
    """Of the recipe it was saved by."""
    from megatron_vlm.config import config_from_tree
    from megatron_vlm.training.job import build_job

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()  # of models loaded before
    tree = Manifest.read(saved).config
    return build_job(config_from_tree(tree | {"checkpoint": tree["checkpoint"] | keys}, "the recipe"), 1)


def test_a_changed_tokenizer_is_told_before_it_is_read(checkpoint: Path) -> None:
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"is damaged: tokenizer\.json has 100000 bytes"):
        megatron_vlm.load(checkpoint)


def test_a_dtype_that_no_file_has_is_not_exported(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    tensor = metadata.state_dict_metadata[TENSOR]
    properties = dataclasses.replace(tensor.properties, dtype=torch.complex64)
    metadata.state_dict_metadata[TENSOR] = dataclasses.replace(tensor, properties=properties)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    vouch_for_all(checkpoint)
    with pytest.raises(CheckpointError, match=f"{TENSOR} is of dtype complex64, needs one of float64, float32"):
        plan_export(checkpoint)


def test_objects_of_other_kinds_are_one_error(saved: Path, checkpoint: Path) -> None:
    """Data, but not what a run keeps: where all states are loaded, nothing of it is taken for granted."""
    from megatron_vlm.checkpoint.store import load_checkpoint

    job = a_job(saved)
    torch.save({"optimizer": {0: [1, 2], 1: "text"}}, checkpoint / "common.pt")
    vouch_for_all(checkpoint)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model: "):
        load_checkpoint(checkpoint, job.model, job.optimizer, states="all")
    metadata, _ = with_code(checkpoint, [1, 2])
    random = next(index for index in metadata.storage_data if "random_states" in index.fqn)
    extra = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    metadata.storage_data[random] = metadata.storage_data[extra]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    shutil.copy(saved / "common.pt", checkpoint / "common.pt")
    vouch_for_all(checkpoint)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model: "):
        load_checkpoint(checkpoint, job.model, job.optimizer, states="all")
