"""Our own checkpoints: a hostile file that the manifest vouches for; or a hostile manifest, `latest` or directory."""

import io
import json
import os
import pickle
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

import megatron_vlm
from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import FILE_NAME, Manifest
from megatron_vlm.checkpoint.recipe import inference_config
from megatron_vlm.checkpoint.resume import find_start
from megatron_vlm.config import config_from_tree
from megatron_vlm.config.schema import CheckpointConfig, Config, ParallelConfig
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.inspection import inspect
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.distributed import Launch, init_world
from megatron_vlm.training.job import build_job
from tests.fuzz import hostile, pickles
from tests.fuzz.kind import Kind, Read
from tests.fuzz.tripwire import PLANTED
from tests.fuzz.verdicts import Wrong
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.jobs import save

NAMES = ("step_0000001", "step_0000002")


@dataclass(frozen=True)
class Base:
    """A folder of two checkpoints, the recipe of their run, and what `.metadata` of the newer holds."""

    folder: Path
    recipe: Config
    metadata: Metadata


def prepare(folder: Path) -> Base:
    """Saved by the product, in a process of its own: what follows is forked, and a process group has threads."""
    recipe = tiny_recipe(folder)
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is logged of it
            init_world(Launch(), current_device(), 60)
            save(build_job(recipe, 1), 2)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "no checkpoint could be saved"
    root = folder / "checkpoints"
    shutil.copytree(root / NAMES[1], root / NAMES[0])
    replace(Manifest.read(root / NAMES[1]), step=1).write(root / NAMES[0])
    return Base(root, recipe, pickle.loads((root / NAMES[1] / ".metadata").read_bytes()))


def make_files(random: Random, base: Base, folder: Path) -> Read:
    """A hostile file for which the manifest vouches, as one who tampers with a checkpoint would have it."""
    root = folder / "run"
    shutil.copytree(base.folder / NAMES[1], root / NAMES[1])
    (root / "latest").write_text(NAMES[1])
    step = root / NAMES[1]
    vouched = Manifest.read(step)
    spoil = random.choice((_metadata, _metadata, _metadata, _pickle_of_metadata, _pickle_of_metadata, _objects, _common,
                           _bytes, _configs))  # fmt: skip
    spoil(random, base, step)
    if random.random() < 0.95:
        _vouch(step, vouched)
    return random.choice((_load, _load, _load, _inspect, _resume, _export))(base, root)


def make_manifest(random: Random, base: Base, folder: Path) -> Read:
    """A hostile manifest or `latest`, or directory."""
    root = folder / "run"
    shutil.copytree(base.folder, root)
    (folder / f"{PLANTED}.py").write_text("from tests.fuzz import tripwire\ntripwire.fire()\n")
    path = root / NAMES[1] / FILE_NAME
    kind = random.randrange(12)
    good = json.loads(path.read_text())
    if kind < 4:
        path.write_bytes(hostile.json_bytes(random, good))
    elif kind == 4:
        _flip(random, path)
        return _read_flipped(base, root)
    elif kind == 5:
        hostile.in_its_place(random, path)
    elif kind == 6:
        _listed(random, root / NAMES[1], good)
    elif kind == 7:
        _latest(random, root)
    elif kind == 8:
        _directories(random, root)
    elif kind == 9:
        good["config"]["extensions"] = random.choice(
            ([PLANTED], ["unittest.__main__"], ["antigravity"], ["a\0b"], ["this"])
        )
        path.write_text(json.dumps(good))
        _sign(root / NAMES[1], config=good["config"])
    elif kind == 10:
        _sign(root / NAMES[1], config=hostile.tree(random, good["config"]))
    else:
        key = random.choice([name for name in good if name != "config"])
        _sign(root / NAMES[1], **{key: hostile.tree(random, good[key])})
    return random.choice((_read_manifest, _read_manifest, _find, _inspect, _load))(base, root)


def _vouch(step: Path, vouched: Manifest) -> None:
    """Sizes and hashes of the files as they are go into the manifest."""
    files = [path for path in step.rglob("*") if path.name != FILE_NAME and path.is_file()]
    replace(vouched, files=records_of(step, files)).write(step)


def _sign(step: Path, /, **entries: Any) -> None:
    """A manifest with other entries, written as the product writes it, its checksum right; as it stands where that
    cannot be."""
    try:
        replace(Manifest.read(step), **entries).write(step)
    except (AttributeError, TypeError, ValueError):
        tree = json.loads((step / FILE_NAME).read_text())
        (step / FILE_NAME).write_text(json.dumps(tree | entries))


def _flip(random: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _listed(random: Random, step: Path, good: dict[str, Any]) -> None:
    """Names of files that lead elsewhere, or to what is no file."""
    names = ("/dev/zero", "/dev/stdin", "../../../outside/secret.txt", "../step_0000001/common.pt", "a\0b", "pipe", "",
             ".", "language", "tokenizer/../common.pt", "\x1b[2J", "\ud800", "x" * 5_000, "link")  # fmt: skip
    os.mkfifo(step / "pipe")
    (step / "link").symlink_to("../../../outside/secret.txt")
    files = dict(good["files"])
    for name in random.sample(names, 2):
        files[name] = random.choice(([0, "0" * 64], [17, "x"], ["1", None], {}, None, [10**30, "0" * 64], [-1, ""]))
    if random.random() < 0.3:
        files = random.choice(({}, [], None, {**files, "common.pt": [0, ""]}, dict(list(files.items())[:2])))
    if random.random() < 0.5:
        _sign(step, files=files)
    else:
        (step / FILE_NAME).write_text(json.dumps({**good, "files": files}))


def _latest(random: Random, root: Path) -> None:
    path = root / "latest"
    if random.random() < 0.4:
        hostile.in_its_place(random, path)
        return
    words = (*hostile.TEXTS, "../outside", "step_0000001/../step_0000002", "step_9999999", "step_0000002\n\n", "x\ny",
             "/etc", "step_0000002\0", "run", "step_0000002\x1b")  # fmt: skip
    path.write_bytes(
        random.choice((random.choice(words).encode("utf-8", "surrogatepass"), random.randbytes(40), b"\0" * 9))
    )


def _directories(random: Random, root: Path) -> None:
    """Other things under names that runs use."""
    names: tuple[str, ...] = ("step_0000003", "step_\u0663", "step_" + "9" * 23, "step_0000002x", "step_-1")
    names += (".partial_step_0000002", ".removed_step_0000001", ".replaced_step_0000002", "damaged_step_0000002")
    names += ("step_\x1b[2J", ".run")
    for name in random.sample(names, 3):
        kind = random.randrange(4)
        if kind == 0:
            (root / name).symlink_to(random.choice(("../../outside", "step_0000002", "nowhere", "/etc", name)))
        elif kind == 1:
            shutil.copytree(root / NAMES[0], root / name)
        else:
            hostile.in_its_place(random, root / name)


def _metadata(random: Random, base: Base, step: Path) -> None:
    """Bytes of `.metadata`: other opcodes behind what is good, or nothing good."""
    path, metadata = step / ".metadata", base.metadata
    kind = random.randrange(8)
    if kind == 0:
        path.write_bytes(hostile.some_bytes(random, path.read_bytes()))
    elif kind == 1:
        path.write_bytes(pickles.with_code(random, step.parents[1]))
    elif kind == 2:
        path.write_bytes(pickles.program(random))
    elif kind == 3:
        good = pickle.dumps(metadata, protocol=2)
        path.write_bytes(pickles.program(random, good[:-1], memo=random.choice((5, 500))))
    elif kind < 6:
        path.write_bytes(pickles.set_state(random, metadata))
    else:
        victim = next(key for key in metadata.storage_data if "_extra_state" in key.fqn)
        kinds = metadata.state_dict_metadata
        names = [name for name, kind_ in kinds.items() if isinstance(kind_, TensorStorageMetadata)]
        _append(random, metadata, victim, step)
        name = random.choice([name for name in names if name.startswith(("language.", "model.", "vision."))] or names)
        path.write_bytes(pickles.hidden_object(metadata, victim, name))


def _append(random: Random, metadata: Metadata, key: Any, step: Path) -> None:
    """What `key` names becomes planted code, behind the file's own bytes."""
    code = pickles.with_code(random, step.parents[1])
    stored = metadata.storage_data[key]
    file = step / stored.relative_path
    metadata.storage_data[key] = replace(stored, offset=file.stat().st_size, length=len(code))
    with open(file, "ab") as end:
        end.write(code)


def _pickle_of_metadata(random: Random, base: Base, step: Path) -> None:
    """`.metadata` of the right types that says something else."""
    metadata = base.metadata
    key = random.choice(list(metadata.storage_data))
    stored = metadata.storage_data[key]
    tensors = [name for name, one in metadata.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)]
    name = random.choice(tensors)
    tensor = metadata.state_dict_metadata[name]
    kind = random.randrange(12)
    number = random.choice((*hostile.NUMBERS, None, "x", [1]))
    if kind == 0:
        metadata.storage_data[key] = replace(stored, offset=number)
    elif kind == 1:
        metadata.storage_data[key] = replace(stored, length=number)
    elif kind == 2:
        os.mkfifo(step / "pipe")
        metadata.storage_data[key] = replace(stored, relative_path=random.choice((*hostile.TEXTS, "pipe", None, 3)))
    elif kind == 3:
        sizes = random.choice(((10**12,), (-1,), (0,), (), (2**40, 2**40), (331,)))
        metadata.state_dict_metadata[name] = replace(tensor, size=torch.Size(sizes))
    elif kind == 4:
        chunk = replace(tensor.chunks[0], sizes=torch.Size(random.choice(((10**11,), (0,), (), (1, 1, 1)))))
        metadata.state_dict_metadata[name] = replace(
            tensor, chunks=random.choice(([chunk], [], [*tensor.chunks, chunk], [1], None))
        )
    elif kind == 5:
        chunk = replace(tensor.chunks[0], offsets=torch.Size([5] * len(tensor.chunks[0].offsets)))
        metadata.state_dict_metadata[name] = replace(tensor, chunks=[chunk])
    elif kind == 6:
        dtype = random.choice((torch.float64, torch.int8, torch.bool, torch.complex64, torch.quint8))
        metadata.state_dict_metadata[name] = replace(tensor, properties=replace(tensor.properties, dtype=dtype))
    elif kind == 7:
        swapped = random.choice((BytesStorageMetadata(), None, 3, tensor.properties))
        metadata.state_dict_metadata[random.choice(list(metadata.state_dict_metadata))] = swapped
    elif kind == 8:
        other = random.choice(list(metadata.storage_data))
        metadata.storage_data[key] = metadata.storage_data[other]
    elif kind == 9:
        del metadata.storage_data[key]
    elif kind == 10:
        field = random.choice(("state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version"))
        setattr(metadata, field, random.choice((None, {}, [], 3, {"a": 1}, {None: None}, "x")))
    else:
        metadata.state_dict_metadata[random.choice(("language.x", "\x1b[2J", "", "vision.\ud800"))] = tensor
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def _objects(random: Random, base: Base, step: Path) -> None:
    """Planted code, or a bomb, where an object or a tensor stands."""
    metadata = base.metadata
    key = random.choice(list(metadata.storage_data))
    if random.random() < 0.5:
        key = next(one for one in metadata.storage_data if "_extra_state" in one.fqn or one.fqn.startswith("random"))
    _append(random, metadata, key, step)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def _common(random: Random, base: Base, step: Path) -> None:
    path = step / "common.pt"
    kind = random.randrange(5)
    if kind == 0:
        path.write_bytes(pickles.with_code(random, step.parents[1]))
    elif kind == 1:
        path.write_bytes(hostile.some_bytes(random, path.read_bytes()))
    elif kind == 2:
        path.write_bytes(pickles.program(random))
    elif kind == 3:
        held = torch.load(path, weights_only=True)
        torch.save(hostile.tree(random, held) if isinstance(held, dict) else 3, path)
    else:
        written = io.BytesIO()
        torch.save({"a": torch.zeros(1).expand(10**9), "b": hostile.deep(random)}, written)
        path.write_bytes(written.getvalue())


def _bytes(random: Random, base: Base, step: Path) -> None:
    path = step / random.choice(("__0_0.distcp", "__0_0.distcp", "metadata.json"))
    if random.random() < 0.15:
        hostile.in_its_place(random, path)
        return
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    data[place : place + 200] = hostile.some_bytes(random, bytes(data[place : place + 200]))
    path.write_bytes(data)


def _configs(random: Random, base: Base, step: Path) -> None:
    """The configs and the tokenizer beside the weights."""
    (step.parents[1] / f"{PLANTED}.py").write_text("from tests.fuzz import tripwire\ntripwire.fire()\n")
    files = [path for name in ("language", "vision", "tokenizer") for path in (step / name).glob("*.json")]
    path = random.choice(files)
    tree = json.loads(path.read_text())
    if random.random() < 0.2:
        hostile.in_its_place(random, path)
    elif random.random() < 0.2:
        path.write_text(
            json.dumps({**tree, "auto_map": {"AutoConfig": f"{PLANTED}.A", "AutoTokenizer": [f"{PLANTED}.A", None]}})
        )
    else:
        path.write_bytes(hostile.json_bytes(random, tree))


def _load(base: Base, root: Path) -> Read:
    return lambda: megatron_vlm.load(root, device="cpu")


def _inspect(base: Base, root: Path) -> Read:
    return lambda: str(inspect(root))


def _export(base: Base, root: Path) -> Read:
    return lambda: plan_export(root, None, None).write(root.parent / "exported", lambda number: None)


def _resume(base: Base, root: Path) -> Read:
    def read() -> None:
        init_world(Launch(), current_device(), 60)
        section = base.recipe.checkpoint.model_copy(update={"directory": str(root)})
        build_job(base.recipe.model_copy(update={"checkpoint": section}), 1, resumes=True)

    return read


def _read_manifest(base: Base, root: Path) -> Read:
    def read() -> None:
        manifest = Manifest.read(find_checkpoint(root))
        config_from_tree(manifest.config, "manifest.json")
        inference_config(find_checkpoint(root), ParallelConfig())

    return read


def _read_flipped(base: Base, root: Path) -> Read:
    """One bit of manifest.json is another: it is found, or it is one that says nothing."""

    def read() -> None:
        if Manifest.read(root / NAMES[1]) != Manifest.read(base.folder / NAMES[1]):
            raise Wrong("a manifest of which one bit is another is accepted")

    return read


def _find(base: Base, root: Path) -> Read:
    """As a run starts."""

    def read() -> None:
        init_world(Launch(), current_device(), 60)
        found = find_start(CheckpointConfig(directory=str(root)), torch.distributed.group.WORLD)  # type: ignore[arg-type]
        if found is not None:
            found.check_recipe(base.recipe)

    return read


CHECKPOINTS = Kind("checkpoint", 600, prepare, make_files)
MANIFESTS = Kind("manifest", 500, prepare, make_manifest)
