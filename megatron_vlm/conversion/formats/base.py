"""What a format is, what reading one gives, and the table of formats.

A format is a module of this package: how its directories are recognised and opened, and, where models are also written
in it, how their tensors and configuration are called there. The engine does the rest.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_vlm.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.mappings import EMBEDDING, HEAD
from megatron_vlm.conversion.sources import FolderSource, WeightSource
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.registry import Registry


@dataclass(frozen=True)
class ForeignModel:
    """A model in somebody else's directory: configs and headers are read, no tensor yet.

    Args:
        format: registered name.
        folder: where it was found; of a pair, the language model's.
        language: config of the language model, its `vocab_size` that of the weights.
        vision: config of the tower alone.
        vision_path: where the tower's preprocessor config is; None where the model type's usual one holds.
        projector: a registered type ("mlp2x_gelu").
        select_layer, select_feature: as in the recipe.
        source: every tensor by canonical name, one at a time.
        tokenizer: a directory AutoTokenizer loads.
        image_token: of the prompts.
        template, image_mode: `data.template` and `data.image_mode` that fit.
        own: the source of the folder's own weight files; None where they do not make a model of the format.
    """

    format: str
    folder: Path
    language: PretrainedConfig
    vision: PretrainedConfig
    vision_path: Path | None
    projector: str
    select_layer: int
    select_feature: str
    source: WeightSource
    tokenizer: Path
    image_token: str
    template: str
    image_mode: str
    own: FolderSource | None = None


@dataclass(frozen=True)
class Target:
    """What the configuration of an exported model is made from.

    Args:
        checkpoint: which is exported; it holds tokenizer/ and vision/.
        config: its recipe.
        language, vision: configs of the parts.
        media: pixels and tokens of a picture.
        num_dropped_tokens: leading tokens of the tower that are not taken (CLS).
        image_token_id: of the tokenizer; it may lie outside the vocabulary.
    """

    checkpoint: Path
    config: Config
    language: PretrainedConfig
    vision: PretrainedConfig
    media: MediaSpec
    num_dropped_tokens: int
    image_token_id: int


@dataclass(frozen=True)
class Format:
    """One on-disk format.

    Args:
        name: registered name.
        families: of the product's models.
        recognises: whether a directory with this config.json is one.
        open: reads configs and headers.
        disk_name: canonical name -> name on the disk; None where models are not written in this format.
        write_extras: writes the configuration of a model beside its tokenizer's files; given what of the language
            model's config differs (vocabulary and dtype as written).
        has_image_token: whether prompts carry the image token's id, so that the embedding needs its row.
    """

    name: str
    families: tuple[str, ...]
    recognises: Callable[[Path, dict[str, Any]], bool]
    open: Callable[[Path], ForeignModel]
    disk_name: Callable[[str], str] | None = None
    write_extras: Callable[[Path, Target, dict[str, Any]], None] | None = None
    has_image_token: bool = False


FORMATS: Registry[Format] = Registry("format")


def open_foreign(path: str | Path, format: str | None = None) -> ForeignModel:
    """A model directory of another system.

    Args:
        format: its registered name; default: the one that recognises it.

    Raises:
        ConversionError: no directory, none that a format recognises, or one that is not whole.
        ConfigError: an unknown format, or a model this package does not build.
    """
    folder = Path(path)
    if format is not None:
        return FORMATS.get(format).open(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such directory")
    found = _recognised(folder)
    if found is None:
        raise ConversionError(f"{folder}: no format recognises it; known: {', '.join(FORMATS.names())}")
    return found.open(folder)


def is_foreign(path: str | Path) -> bool:
    """Whether a format recognises the directory, which is no checkpoint of ours."""
    return Path(path).is_dir() and _recognised(Path(path)) is not None


def _recognised(folder: Path) -> Format | None:
    if (folder / MANIFEST).exists() or not (folder / "config.json").is_file():
        return None
    settings = read_json(folder / "config.json")
    return next((f for f in map(FORMATS.get, FORMATS.names()) if f.recognises(folder, settings)), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{path}: holds a {type(settings).__name__}, needs an object")
    return settings


def fitting_vocabulary(language: PretrainedConfig, source: WeightSource) -> PretrainedConfig:
    """The config with the vocabulary of the weights: some directories pad one and not the other."""
    if EMBEDDING in source.names() and (shape := source.read(EMBEDDING).shape):
        language.vocab_size = shape[0]
    return language


def is_tied(declared: bool, source: WeightSource) -> bool:
    """Whether the head is the embedding. Where a config says so and another head is stored, transformers keeps both."""
    if not declared or HEAD not in source.names() or EMBEDDING not in source.names():
        return declared
    return torch.equal(source.read(HEAD), source.read(EMBEDDING))


def fitting_template(folder: Path, language: PretrainedConfig) -> str:
    """`data.template` for a directory: its tokenizer's chat template where it takes plain text turns, else LLaVA's own.

    LLaVA's processors have templates over typed parts (`content['type']`), which say the same as `vicuna_v1`.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    text = str(settings.get("chat_template") or "")
    jinja = folder / "chat_template.jinja"
    if not text and jinja.is_file():
        text = jinja.read_text(encoding="utf-8")
    if text and "['type']" not in text and "selectattr" not in text:
        return "auto"
    return "vicuna_v1" if language.model_type == "llama" else "auto"
