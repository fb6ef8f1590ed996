"""Directories of other systems: safetensors headers that lie, pickles, indexes, configs; inspected, loaded."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import megatron_vlm
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.conversion.transfer.inspection import inspect
from tests.fuzz import hostile, pickles
from tests.fuzz.kind import Kind, Read
from tests.fuzz.tripwire import PLANTED
from tests.helpers.models.foreign_models import llava, llava_hf, tree

CODES = ("F32", "BF16", "F16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "I4", "x", "", None, 3, [])
SHAPES: tuple[Any, ...] = ([-4, -4], [4.0, 4.0], ["4", "4"], [None], [[4]], "44", [True], [10**30, 0], [2**32, 2**32])
SHAPES += ([0], [], {}, None, 3, [2**63], [1] * 100)


@dataclass(frozen=True)
class Base:
    """Good directories, each with what it names as its tower."""

    folders: list[Path]
    files: dict[Path, dict[str, bytes]]


def prepare(folder: Path) -> Base:
    folders = [llava_hf(folder / "hf"), llava_hf(folder / "shards", shard_bytes=100_000)]
    folders += [llava(folder / "safe"), llava(folder / "pickled", pickles=True)]
    return Base(folders, {one: tree(one) for one in folders})


def make(random: Random, base: Base, folder: Path) -> Read:
    source = random.choice(base.folders)
    model = folder / "model"
    shutil.copytree(source, model)
    if (tower := source.parent / f"{source.name}_tower").exists():
        shutil.copytree(tower, folder / "tower")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(folder / "tower")}))
    for place in (folder, model):
        (place / f"{PLANTED}.py").write_text("from tests.fuzz import tripwire\ntripwire.fire()\nclass A: pass\n")
    weights = sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".bin"))
    indexes = sorted(model.glob("*.index.json"))
    kind = random.randrange(10)
    path = random.choice(weights)
    if kind < 4 and path.suffix == ".safetensors":
        path.write_bytes(_safetensors(random, path.read_bytes()))
    elif kind < 5:
        path.write_bytes(hostile.some_bytes(random, path.read_bytes()))
    elif kind == 5:
        hostile.in_its_place(random, random.choice([*weights, *indexes, model / "config.json"]))
    elif kind < 8 and indexes and random.random() < 0.6:
        _index(random, random.choice(indexes))
    elif kind < 8:
        path = path if path.suffix == ".bin" else model / random.choice(("pytorch_model.bin", "mm_projector.bin"))
        written = pickles.with_code(random, folder) if random.random() < 0.7 else pickles.program(random)
        path.write_bytes(written)
        if random.random() < 0.5:
            for other in (*indexes, *(one for one in weights if one.suffix == ".safetensors")):
                other.unlink()
    else:
        _config(random, model)
    destination = folder / "imported"
    return random.choice(
        (
            lambda: str(inspect(model)),
            lambda: str(inspect(model)),
            lambda: import_model(open_foreign(model), destination),
            lambda: import_model(open_foreign(model), destination),
            lambda: megatron_vlm.load(model, device="cpu"),
        )
    )


def _safetensors(random: Random, good: bytes) -> bytes:
    """A header that lies, with the length it has or another."""
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = random.choice(names), random.choice(names)
    kind = random.randrange(8)
    if kind == 0:
        header[one]["shape"] = random.choice(SHAPES)
    elif kind == 1:
        header[one]["dtype"] = random.choice(CODES)
    elif kind == 2:
        start, end = header[one]["data_offsets"]
        lies: tuple[Any, ...] = (
            [end, start],
            [0, 0],
            [float(start), end],
            [start - 1, end - 1],
            [str(start), end],
            [start],
        )
        lies += ([True, end], [-1, 10**30], None, "ab", {"0": 1})
        header[one]["data_offsets"] = random.choice(lies)
    elif kind == 3:
        header[one] = header[other]
    elif kind == 4:
        header[random.choice((*hostile.KEYS, "\x1b[2J", "language_model.model.embed_tokens.weight"))] = header.pop(one)
    elif kind == 5:
        header["__metadata__"] = hostile.value(random)
    else:
        header = hostile.tree(random, header)
    written = json.dumps(header).encode()
    if random.random() < 0.2:
        written = hostile.json_text(random, written)
    length = random.choice((len(written),) * 8 + (0, 1, len(written) - 1, len(written) + 8, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + written + data


def _index(random: Random, path: Path) -> None:
    index = json.loads(path.read_text())
    names = list(index["weight_map"])
    if random.random() < 0.5:
        word = random.choice((*hostile.TEXTS, "../../outside/secret.txt", "/dev/zero", "config.json", None, 3, ["a"]))
        index["weight_map"][random.choice(names)] = word
        path.write_text(json.dumps(index))
    else:
        path.write_bytes(hostile.json_bytes(random, index))


def _config(random: Random, model: Path) -> None:
    path = random.choice(sorted(model.glob("*.json")))
    config = json.loads(path.read_text())
    if random.random() < 0.2:
        config["auto_map"] = {
            name: f"{PLANTED}.A" for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor")
        }
    elif random.random() < 0.3:
        key = random.choice(
            ("mm_vision_tower", "mm_projector_type", "_name_or_path", "model_type", "image_token_index")
        )
        config[key] = hostile.value(random)
    else:
        config = hostile.tree(random, config)
    written = json.dumps(config).encode()
    path.write_bytes(written if random.random() < 0.85 else hostile.json_text(random, written))


WEIGHTS = Kind("weights", 600, prepare, make)
