"""What a format is, what reading one gives, and the table of formats.

A format is a module of this package: how its directories are recognised and opened, and, where models are also written
in it, how their tensors and configuration are called there. The engine does the rest.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_vlm.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.mappings import EMBEDDING, HEAD
from megatron_vlm.conversion.sources import FolderSource, WeightSource, resolve_folder
from megatron_vlm.errors import ConversionError, one_line
from megatron_vlm.models import hub
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.registry import Registry
from megatron_vlm.runtime.files import parse_json, read_text


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
        commits: of the hub ids that it came from, as they were named.
        drops_first_token: the model drops one token of the tower's, whatever it is; `select_feature` is "patch" then,
            which is the same only where one comes before the patches: see `check_selection`.
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
    drops_first_token: bool = False
    commits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where parts lie that a directory only names, a directory or a hub id each, and what it leaves open; None: as it
    says.

    Args:
        tower: the vision tower.
        base: the language model of a projector alone.
        downsample_order: of the squares of `mlp_downsample`, column or row.
    """

    tower: str | None = None
    base: str | None = None
    downsample_order: str | None = None


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
        open: reads configs and headers; the second argument is for formats that name parts.
        disk_name: canonical name -> name on the disk; None where models are not written in this format.
        write_extras: writes the configuration of a model beside its tokenizer's files; given what of the language
            model's config differs (vocabulary and dtype as written).
        has_image_token: whether prompts carry the image token's id, so that the embedding needs its row.
        names_parts: whether a directory may name a tower or a language model that lies elsewhere.
    """

    name: str
    families: tuple[str, ...]
    recognises: Callable[[Path, dict[str, Any]], bool]
    open: Callable[[Path, Places], ForeignModel]
    disk_name: Callable[[str], str] | None = None
    write_extras: Callable[[Path, Target, dict[str, Any]], None] | None = None
    has_image_token: bool = False
    names_parts: bool = False


FORMATS: Registry[Format] = Registry("format")
MAX_CONFIG_BYTES = 2**26  # far above any real one; Python's objects of it may take thirty times as much


def open_foreign(path: str | Path, format: str | None = None, places: Places = Places()) -> ForeignModel:
    """A model directory of another system.

    Args:
        path: the directory, or a hub id, which is fetched.
        format: its registered name; default: the one that recognises it.
        places: where parts lie that the directory only names.

    Raises:
        ConversionError: no directory, none that a format recognises, or one that is not whole.
        ConfigError: an unknown format, or a model this package does not build.
    """
    known = None if format is None else FORMATS.get(format)
    folder = _folder(path)
    found = known or _recognised(folder)
    if found is None:
        raise ConversionError(f"{folder}: no format recognises it; known: {', '.join(FORMATS.names())}")
    if places != Places() and not found.names_parts:
        raise ConversionError(f"{folder}: a directory of {found.name} holds all its parts; found {places}")
    foreign = found.open(folder, places)
    return replace(foreign, commits={**hub.commits({str(path): folder}), **foreign.commits})


def is_foreign(path: str | Path) -> bool:
    """Whether a format recognises the directory, which is no checkpoint of ours."""
    return Path(path).is_dir() and _recognised(Path(path)) is not None


def is_on_hub(path: str | Path) -> bool:
    """Whether it has the form of a hub id with its owner's name, and nothing is there on this machine."""
    found = hub.parse(path)
    return found is not None and "/" in found.repository


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir() and not is_on_hub(path):
        raise ConversionError(f"{path}: no such directory")
    return resolve_folder(str(path))


def recognised(folder: Path) -> str | None:
    """The name of the format that recognises a directory."""
    found = _recognised(folder)
    return None if found is None else found.name


def _recognised(folder: Path) -> Format | None:
    if os.path.lexists(folder / MANIFEST) or not os.path.lexists(folder / "config.json"):
        return None
    settings = read_json(folder / "config.json")
    return next((f for f in map(FORMATS.get, FORMATS.names()) if f.recognises(folder, settings)), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError."""
    try:
        settings = parse_json(read_text(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{path}: holds a {type(settings).__name__}, needs an object")
    return settings


def with_rope_of_4(language: dict[str, Any]) -> dict[str, Any]:
    """A language model's config with `rope_parameters` as transformers 4 and the original LLaVA look for them.

    Those know `rope_theta` and `rope_scaling` alone, and without them take the plain frequencies of theta 10000.
    """
    scaling = dict(language.get("rope_parameters") or {})
    if not scaling:
        return language
    theta = scaling.pop("rope_theta", language.get("rope_theta"))
    kind = scaling.pop("rope_type", "default")
    if kind == "default":
        return {**language, "rope_theta": theta}
    # `type`, and for `linear` just `factor` beside it: versions before 4.43 refuse any other key
    return {**language, "rope_theta": theta, "rope_scaling": {**scaling, "type": kind}}


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


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a tokenizer's vocabulary, or what stands in its place."""
    return any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def fitting_template(folder: Path, language: PretrainedConfig) -> str:
    """`data.template` for a directory: its chat template where that takes plain text turns, else the one that says the
    same; LLaVA's own where there is none.

    LLaVA's processors have templates over typed parts (`content['type']`), which take no plain text. Its 1.5 makes the
    roles of `vicuna_v1` by `message['role'].upper()`.

    Raises:
        ConversionError: a template over typed parts that none of ours stands for, or one that cannot be read.
    """
    file, text = _chat_template(folder)
    if not text:
        return "vicuna_v1" if language.model_type == "llama" else "auto"
    if "['type']" not in text and "selectattr" not in text:
        return "auto"
    if "ASSISTANT:" in text and ("USER:" in text or "['role'].upper()" in text):
        return "vicuna_v1"
    if "<|start_header_id|>" in text:
        return "llama_3"
    raise ConversionError(
        f"{file}: the chat template takes typed parts and is none of vicuna_v1, llama_3; needs one that takes "
        "message['content'] as text"
    )


def _chat_template(folder: Path) -> tuple[Path, str]:
    """(file, template) of a directory, the template empty where there is none."""
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        if os.path.lexists(path) and (text := read_json(path).get("chat_template")):
            return path, str(text)
    jinja = folder / "chat_template.jinja"
    try:
        return jinja, read_text(jinja, MAX_CONFIG_BYTES) if os.path.lexists(jinja) else ""
    except OSError as error:
        raise ConversionError(f"{jinja}: cannot be read: {one_line(error)}") from error
