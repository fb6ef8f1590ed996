"""Ways to spoil a tiny job, as users and disks do. Each takes the job's folder and says what to override in its recipe.

The folder holds recipe.yaml, train.json, images/, tokenizer/ and, where the job was trained before, checkpoints/.
"""

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.loading import hash_of_tree
from tests.helpers.models.tiny import tiny_clip

Spoil = Callable[[Path], list[str]]
ACCEPT = "checkpoint.accept_changes=[training.steps,model.language.tokenizer]"  # moved, and trained on


class Code:
    """Pickled, it is a call that makes a directory when it is read: `ran` in the job's folder."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "ran"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def with_overrides(*overrides: str) -> Spoil:
    """Nothing but overrides; `{folder}` in them is the job's."""
    return lambda folder: [override.format(folder=folder) for override in overrides]


def with_records(change: Callable[[list[dict[str, Any]]], None]) -> Spoil:
    """The data file's records changed."""

    def spoil(folder: Path) -> list[str]:
        records = json.loads((folder / "train.json").read_text())
        change(records)
        (folder / "train.json").write_text(json.dumps(records))
        return []

    return spoil


def with_step(change: Callable[[Path], None], *overrides: str) -> Spoil:
    """The newest checkpoint changed, and loaded."""

    def spoil(folder: Path) -> list[str]:
        change(newest_step(folder))
        return [f"checkpoint.load={folder}/checkpoints", "training.steps=9", ACCEPT, *overrides]

    return spoil


def newest_step(folder: Path) -> Path:
    """The directory of the job's newest checkpoint."""
    checkpoints = folder / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


def tensors_file(step: Path) -> Path:
    """A file of tensors."""
    return max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)


def vouch_for_all(step: Path) -> None:
    """The manifest, made anew, agrees with its recipe and the files as they are, as one who tampers with them does."""
    entries = json.loads((step / "manifest.json").read_text())
    entries.pop("sha256", None)
    entries["config_hash"] = hash_of_tree(entries["config"])
    there = [path for path in step.rglob("*") if path.is_file() and path != step / "manifest.json"]
    entries["files"] = records_of(step, there)
    Manifest(**entries).write(step)


def as_format(manifest: Path, number: int) -> None:
    """A manifest as the version wrote it whose format that is: up to 2 it had no checksum of itself."""
    entries = json.loads(manifest.read_text())
    del entries["sha256"]
    manifest.write_text(json.dumps(entries | {"format": number}, indent=1))


def flip_byte(path: Path) -> None:
    """The byte in the middle is another one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def malformed_line(folder: Path) -> list[str]:
    """A JSONL file whose fourth line breaks off."""
    lines = [json.dumps(record) for record in json.loads((folder / "train.json").read_text())]
    lines[3] = lines[3][:30]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return [f"data.path={folder}/lines.jsonl"]


def truncated_image(folder: Path) -> list[str]:
    """An image without its end: only decoding it tells."""
    os.truncate(folder / "images" / "2-1.png", 200)
    return ["data.num_workers=2"]


def missing_image(folder: Path) -> list[str]:
    """An image that is not there."""
    (folder / "images" / "2-1.png").unlink()
    return []


def pipe_for_an_image(folder: Path) -> list[str]:
    """Nobody writes to it."""
    image = folder / "images" / "2-1.png"
    image.unlink()
    os.mkfifo(image)
    return []


def half_a_character(folder: Path) -> list[str]:
    """As CESU-8 writes what UTF-8 has in four bytes, in a list."""
    path = folder / "train.json"
    path.write_bytes(path.read_bytes().replace(b'"sample-3"', b'"\xed\xa0\x80"'))
    return []


def endless_template(folder: Path) -> list[str]:
    """A chat template that goes on for a year, at one sample."""
    settings = folder / "tokenizer" / "tokenizer_config.json"
    tokenizer = json.loads(settings.read_text())
    jinja = folder / "tokenizer" / "chat_template.jinja"
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    guarded = "{% if messages | length > 2 %}" + loops + "{% endif %}"
    if jinja.exists():
        jinja.write_text(guarded + jinja.read_text())
    else:
        settings.write_text(json.dumps(tokenizer | {"chat_template": guarded + tokenizer["chat_template"]}))
    return []


def code_in_metadata(step: Path) -> None:
    """In what torch reads with a plain pickle.load. As with all code in checkpoints, the manifest vouches for it."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    metadata.planner_data = Code(step.parents[1])
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    vouch_for_all(step)


def code_in_common(step: Path) -> None:
    """In what megatron-core reads by torch.load."""
    torch.save({"optimizer": Code(step.parents[1])}, step / "common.pt")
    vouch_for_all(step)


def code_between_tensors(step: Path) -> None:
    """In place of an object that torch reads with weights_only=False."""
    written = io.BytesIO()
    torch.save(Code(step.parents[1]), written)
    metadata = pickle.loads((step / ".metadata").read_bytes())
    place = next(place for place in metadata.storage_data if "_extra_state" in place.fqn)
    file = step / metadata.storage_data[place].relative_path
    code = replace(metadata.storage_data[place], offset=file.stat().st_size, length=len(written.getvalue()))
    metadata.storage_data[place] = code
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    file.write_bytes(file.read_bytes() + written.getvalue())
    vouch_for_all(step)


def code_in_weights(folder: Path) -> list[str]:
    """A tower whose weights are a pickle."""
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(tiny_clip()))
    torch.save({"weights": Code(folder)}, folder / "tower" / "pytorch_model.bin")
    return ["model.vision.config=null", f"model.vision.path={folder}/tower"]


def code_beside_the_config(folder: Path) -> list[str]:
    """A language model that wants code of its own to be run."""
    model = folder / "model"
    model.mkdir()
    remote = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(remote))
    (model / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\nclass OwnConfig: pass\n")
    return ["model.language.config=null", f"model.language.path={model}"]
