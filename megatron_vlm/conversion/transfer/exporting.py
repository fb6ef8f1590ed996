"""A checkpoint of ours -> a model directory of another system, tensor by tensor.

A checkpoint that came from the same format gets back the names, the files and, bit for bit, everything it was not
trained on; any other gets names from the format's table, shards of at most 5 GB, and a configuration of its own. So
does the configuration of one whose recipe is another by now: the names and shards stay. One that has trained says how
it was asked (`asking`) and has a card of its own.
The directory is written beside its place and renamed.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.checkpoint.integrity import refuse_damage, refuse_unlisted, sync_directory
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.model_sources import read_sources, write_sources
from megatron_vlm.checkpoint.recipe import PARTS, former_preprocessor, kept_tower, saved_config, tell_former
from megatron_vlm.config.schema import VisionConfig
from megatron_vlm.conversion.formats.base import FORMATS, Format, Target, read_json
from megatron_vlm.conversion.formats.llava import TOWER_INSIDE, told_order
from megatron_vlm.conversion.mappings import EMBEDDING, HEAD, TOWER_PREFIX
from megatron_vlm.conversion.native.reading import NativeSource
from megatron_vlm.conversion.table import model_mappings
from megatron_vlm.conversion.transfer.asking import (
    Asking,
    is_recorded,
    let_transformers_4_read,
    write_record,
    write_stops,
)
from megatron_vlm.conversion.transfer.destination import refuse_taken
from megatron_vlm.conversion.transfer.export_plan import (
    TOWER_FILE,
    ShardPlan,
    index_of,
    plan_fresh,
    plan_returned,
    write_shards,
)
from megatron_vlm.conversion.transfer.model_card import CARD, ORIGINS_CARD, base_models, made_from, model_card
from megatron_vlm.conversion.transfer.origin import LICENCE_FILES, SENTENCEPIECE_FILE, reading_of
from megatron_vlm.conversion.transfer.origin_record import FOLDER, Origin
from megatron_vlm.conversion.weights.files import INDEXES, SAFETENSORS_INDEX
from megatron_vlm.conversion.weights.tower_names import TowerNames
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError, ConversionError, one_line
from megatron_vlm.models.description import describe_model
from megatron_vlm.models.hf_config import config_from_path
from megatron_vlm.runtime.logging import get_logger

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROW_MULTIPLE = 64  # of embedding rows, where the image token needs one, as in transformers' own LLaVA weights
DTYPE_KEYS = ("dtype", "torch_dtype")  # of a config.json, since and before transformers 4.56


class ExportSource:
    """The tensors of a checkpoint as they are written.

    Args:
        stored: the checkpoint.
        spare: tensors that no model here has, from its origin.
        num_rows: of embedding and head; rows beyond the checkpoint's are the mean of its own, so that none of them is
            ever the likeliest.
    """

    def __init__(self, stored: NativeSource, spare: dict[str, Tensor], num_rows: int) -> None:
        self._stored, self._spare, self._num_rows = stored, spare, num_rows

    def names(self) -> Collection[str]:
        """All canonical names; a tied head, which may be read too, is not among them."""
        return {*self._stored.names(), *self._spare}

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._spare[name].dtype if name in self._spare else self._stored.dtype(self._own(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as written."""
        if name in self._spare:
            return tuple(self._spare[name].shape)
        shape = self._stored.shape(self._own(name))
        return (self._num_rows, *shape[1:]) if name in (EMBEDDING, HEAD) else shape

    def read(self, name: str) -> Tensor:
        """One tensor."""
        if name in self._spare:
            return self._spare[name]
        tensor = self._stored.read(self._own(name))
        missing = self.shape(name)[0] - tensor.shape[0] if tensor.dim() else 0
        if not missing:
            return tensor
        return torch.cat([tensor, tensor.float().mean(0).to(tensor.dtype).expand(missing, -1)])

    def _own(self, name: str) -> str:
        return EMBEDDING if name == HEAD and HEAD not in self._stored.names() else name


@dataclass(frozen=True)
class Export:
    """The content of an export: weight files, and everything else by `write_others` into the directory."""

    format: str
    shards: list[ShardPlan]
    source: ExportSource
    write_others: Callable[[Path], None]
    commits: Mapping[str, str]  # of the hub ids that the model came from

    @property
    def size_bytes(self) -> int:
        """Size of all tensors."""
        return sum(shard.size_bytes for shard in self.shards)

    def write(self, destination: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Writes the directory, which does not exist or is empty.

        Args:
            advance: told the bytes of each tensor written; called by several threads.

        Raises:
            ConversionError: it is taken, or the disk refuses. CheckpointError: the checkpoint is damaged.
        """
        refuse_taken(destination)
        beside = destination.with_name(f".partial_{destination.name}")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            self.write_others(beside)
            _write_provenance(beside, self.commits)
            write_shards(beside, self.shards, self.source, advance)
            sync_directory(beside)
            if destination.exists():
                destination.rmdir()
            os.rename(beside, destination)
        except OSError as error:
            raise ConversionError(f"{destination} could not be written: {one_line(error)}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def plan_export(path: str | Path, format: str | None = None, dtype: str | None = None) -> Export:
    """Everything about an export but the writing.

    Args:
        path: a checkpoint of ours, or a directory of them (its latest).
        format: a registered name; default: the one the checkpoint came from, else llava-hf.
        dtype: of all tensors, bf16 | fp16 | fp32; default: as in the origin, else as stored.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ConfigError: an unknown format.
        ConversionError: a model the format has no place for.
    """
    checkpoint = find_checkpoint(path)
    manifest = Manifest.read(checkpoint)
    refuse_unlisted(checkpoint, manifest, (*PARTS, FOLDER))
    refuse_damage(checkpoint, manifest)
    origin, commits = Origin.of(checkpoint), read_sources(checkpoint, manifest.files)
    target_format = _format_of(format, origin)
    target = _target(checkpoint, manifest)
    disk_name = _disk_name(target_format, target)
    table = model_mappings(target.language, target.vision, target.config.model.projector.type)
    stored = NativeSource(checkpoint, table)
    wanted = None if dtype is None else DTYPES[dtype]
    num_rows = target.language.vocab_size
    if target_format.has_image_token and target.image_token_id >= num_rows:
        num_rows = -(-(target.image_token_id + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    shards = None
    if origin is not None and origin.weights and origin.format == target_format.name:
        pixels = json.loads(target.media.processor)  # as trained, which a checkpoint from before may not say
        is_same = origin.is_read_as(reading_of(checkpoint, target.config, target.model, pixels))
        source = ExportSource(stored, origin.spare(), target.language.vocab_size if is_same else num_rows)
        shards = plan_returned(origin, source, disk_name, wanted, is_same)
        if shards is not None and is_same:
            trained = Trained(target, manifest, origin, commits) if manifest.step else None
            others = partial(_write_returned, origin, shards, target.config.model.projector.type, dtype, trained)
            return Export(origin.format, shards, source, others, commits)
    if shards is None:
        came = {t.name: t.torch_dtype for tensors in origin.weights.values() for t in tensors} if origin else {}
        source = ExportSource(stored, {}, num_rows)
        shards = plan_fresh(stored.names(), source, disk_name, lambda name: wanted or came.get(name))
    written = next(t.dtype for shard in shards for t in shard.tensors if t.name == EMBEDDING)
    settings = {"vocab_size": num_rows, "dtype": str(written).removeprefix("torch.")}
    others = partial(_write_fresh, target_format, Trained(target, manifest, origin, commits), settings, shards)
    return Export(target_format.name, shards, source, others, commits)


def _format_of(name: str | None, origin: Origin | None) -> Format:
    """Format by its name, else the origin's, else llava-hf. Raises ConversionError, ConfigError."""
    if name is None:
        is_written = origin is not None and FORMATS.get(origin.format).disk_name is not None
        name = origin.format if origin is not None and is_written else "llava-hf"
    found = FORMATS.get(name)
    if found.disk_name is None:
        names = [other for other in FORMATS.names() if FORMATS.get(other).disk_name is not None]
        raise ConversionError(f"models are not written as {name!r}; choose {' or '.join(names)}")
    return found


def _disk_name(format: Format, target: Target) -> Callable[[str], str]:
    """Canonical -> on the disk, the tower's own names as transformers writes them."""
    of_format, tower = format.disk_name, TowerNames(target.vision)
    assert of_format is not None

    def disk_name(name: str) -> str:
        return of_format(TOWER_PREFIX + tower.disk(name) if name.startswith(TOWER_PREFIX) else name)

    return disk_name


def _target(checkpoint: Path, manifest: Manifest) -> Target:
    config = saved_config(checkpoint, manifest)
    tower = kept_tower(checkpoint)
    former = former_preprocessor(manifest, tower, config.data.image_mode)
    if former is not None:
        tell_former(checkpoint, config.data.image_mode)
    vision = VisionConfig(
        path=tower.path,
        preprocessor=former,
        select_layer=config.model.vision.select_layer,
        select_feature=config.model.vision.select_feature,
    )
    language = config_from_path("language", str(checkpoint / "language"))
    model = describe_model(config.model.model_copy(update={"vision": vision}), language, tower)
    tokenizer = load_tokenizer(checkpoint / "tokenizer", config.data.image_token)
    model.language.name_or_path = model.survey.hf_config.name_or_path = ""  # no paths of this machine
    return Target(checkpoint, config, model, tokenizer.get_vocab()[config.data.image_token])


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose weights are no longer those that were imported, if any were."""

    target: Target
    manifest: Manifest
    origin: Origin | None
    commits: Mapping[str, str]

    def asking(self) -> Asking | None:
        """The way it was asked; None, which is told, of a tokenizer that the recipe's template does not fit: nobody can
        have trained with both."""
        try:
            return Asking.of(self.target.checkpoint, self.target.config, self.target.language.eos_token_id)
        except ConfigError as error:
            get_logger(__name__).warning(
                "the export does not say how prompts begin and answers end: %s", one_line(error)
            )
            return None

    def write_card(self, folder: Path, format: str) -> None:
        """README.md. Raises OSError."""
        former = folder / CARD
        if former.is_file():
            former.rename(folder / ORIGINS_CARD)
        licence = None if self.origin is None else self.origin.licence()
        card = model_card(self.target, self.manifest, format, licence, self.commits)
        (folder / CARD).write_text(card, encoding="utf-8")


def _write_returned(
    origin: Origin, shards: list[ShardPlan], projector: str, dtype: str | None, trained: Trained | None, folder: Path
) -> None:
    """Writes what the model came with; the index anew where the files are others, and in the config what was told
    beside it. Of one that has trained since, also how it was asked in training, and a card."""
    are_returned = all(shard.is_returned for shard in shards)
    origin.copy_files(folder, leave_out=() if are_returned else INDEXES)
    had_index = any(str(file) in INDEXES for file in origin.files())
    if not are_returned and (had_index or len(shards) > 1):
        (folder / SAFETENSORS_INDEX).write_text(index_of(shards), encoding="utf-8")
    came = read_json(folder / "config.json")
    settings = came | told_order(came, projector)
    if dtype is not None:
        own = [key for key in DTYPE_KEYS if key in settings] or [DTYPE_KEYS[0]]
        settings |= dict.fromkeys(own, str(DTYPES[dtype]).removeprefix("torch."))
    if any(shard.file == TOWER_FILE for shard in shards):
        settings |= TOWER_INSIDE
    if settings != came:
        (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if trained is None:
        return
    data, asking = trained.target.config.data, trained.asking()
    if asking is not None:
        asking.write_stops(folder)
        if not asking.is_asked_alike(folder, on_any_day=True):
            asking.write_prompts(folder)
            write_record(folder, data)
            asking.check(folder)
    if not is_recorded(folder, data):
        write_record(folder, data)
    trained.write_card(folder, origin.format)


def _write_fresh(
    format: Format, trained: Trained, settings: dict[str, Any], shards: list[ShardPlan], folder: Path
) -> None:
    """Tokenizer, and what the format makes of the rest."""
    assert format.write_extras is not None
    asking, data = trained.asking(), trained.target.config.data
    if asking is None:
        shutil.copytree(trained.target.checkpoint / "tokenizer", folder, dirs_exist_ok=True)
        tokenizer = load_tokenizer(folder, data.image_token)
        write_stops(folder, tokenizer, {tokenizer.eos_token_id} - {None})
    else:
        asking.write_tokenizer(folder)
        asking.write_stops(folder)
    write_record(folder, data)
    format.write_extras(folder, trained.target, settings)
    let_transformers_4_read(folder / "tokenizer_config.json")
    if trained.origin is not None:
        trained.origin.copy_files(folder, only=(SENTENCEPIECE_FILE, *LICENCE_FILES))
    if len(shards) > 1 or shards[0].file != "model.safetensors":
        (folder / SAFETENSORS_INDEX).write_text(index_of(shards), encoding="utf-8")
    if asking is not None:
        asking.check(folder)
    trained.write_card(folder, format.name)


def _write_provenance(folder: Path, commits: Mapping[str, str]) -> None:
    """sources.json, and where nothing says it yet a card that names them in the hub's way."""
    write_sources(folder, commits)
    if not commits or (folder / CARD).exists():
        return
    text = "\n".join(["---", *base_models(commits), "---", "", *made_from(commits), ""])
    (folder / CARD).write_text(text, encoding="utf-8")
