"""The interface of a format, the result of reading one, and the table of formats.

A format is a module of this package: how its directories are recognised and opened, and, where models are also written
in it, how their tensors and configuration are called there. The engine does the rest.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vlm.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_vlm.config.schema import Config, VideoConfig
from megatron_vlm.conversion.mappings import EMBEDDING, HEAD
from megatron_vlm.conversion.weights.sources import FolderSource, WeightSource, resolve_folder
from megatron_vlm.errors import ConversionError, one_line, shown
from megatron_vlm.models.architectures import LANGUAGE_MODELS
from megatron_vlm.registry import Registry
from megatron_vlm.runtime.files import parse_json, read_text
from megatron_vlm.runtime.limits import LimitError

if TYPE_CHECKING:  # a directory is looked at without torch and transformers, which opening it needs
    from transformers import PretrainedConfig

    from megatron_vlm.models.description import ModelDescription
    from megatron_vlm.models.vision.media_spec import MediaSpec
    from megatron_vlm.models.vision.preprocessing import TowerConfigs


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
        template, image_mode, template_arguments, video: of `data`, that fit.
        own: the source of the folder's own weight files; None where they do not make a model of the format.
        commits: of the hub ids that it came from, as they were named.
        drops_first_token: the model drops one token of the tower's, whatever it is; `select_feature` is "patch" then,
            which is the same only where one comes before the patches: see `check_selection`.
    """

    format: str
    folder: Path
    language: "PretrainedConfig"
    vision: "PretrainedConfig"
    vision_path: Path | None
    projector: str
    select_layer: int
    select_feature: str
    source: WeightSource
    tokenizer: Path
    image_token: str
    template: str
    image_mode: str
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    video: VideoConfig = VideoConfig()
    own: FolderSource | None = None
    drops_first_token: bool = False
    commits: Mapping[str, str] = field(default_factory=dict)

    def read_tower(self) -> "TowerConfigs":
        """Reads the preprocessor config, and gives the tower's configs. Raises ConfigError."""
        from megatron_vlm.models.vision.preprocessing import TowerConfigs, read_preprocessor

        path = None if self.vision_path is None else str(self.vision_path)
        return TowerConfigs(self.vision, {} if path is None else read_preprocessor(path), path)


@dataclass(frozen=True)
class ExternalParts:
    """Directories or hub ids of parts that a directory only names, and what else it leaves open; None: as it
    says.

    Args:
        tower: the vision tower.
        base: the language model of a projector alone.
        options: what the directory leaves open, by the keys of its format's `options`.
    """

    tower: str | None = None
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The facts from which the configuration of an exported model is made.

    Args:
        checkpoint: which is exported; it holds tokenizer/ and vision/.
        config: its recipe.
        model: its description.
        image_token_id: of the tokenizer; it may lie outside the vocabulary.
    """

    checkpoint: Path
    config: Config
    model: "ModelDescription"
    image_token_id: int

    @property
    def language(self) -> "PretrainedConfig":
        """The language model's config."""
        return self.model.language

    @property
    def vision(self) -> "PretrainedConfig":
        """The tower's config."""
        return self.model.survey.hf_config

    @property
    def media(self) -> "MediaSpec":
        """Pixels and tokens of an image."""
        return self.model.media_spec

    @property
    def num_dropped_tokens(self) -> int:
        """Leading tokens of the tower that are not taken (CLS)."""
        return self.model.survey.num_dropped_tokens


@dataclass(frozen=True)
class FolderLook:
    """A directory as its config.json and the headers of its weight files tell of it, without a library that reads them.

    Args:
        language, tower: model types.
        sources: where its tensors are, the directory's own first, and the tower's where that is not in it.
        tower_path: the directory of the tower's weights; None: they are in the directory's own.
    """

    language: str
    tower: str
    sources: tuple[FolderSource, ...]
    tower_path: Path | None = None


@dataclass(frozen=True)
class FormatOption:
    """An option of a format: what its directories may leave open, and a caller then says.

    Args:
        values: that it takes.
        about: what it is, and what each value stands for; part of a sentence.
        is_open: whether a config.json leaves it open.
    """

    values: tuple[str, ...]
    about: str
    is_open: Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Format:
    """One on-disk format.

    Args:
        name: registered name.
        families: of the product's models.
        recognises: whether a directory with this config.json is one.
        open: reads configs and headers, but for config.json; the second argument is for formats that name parts.
        disk_name: canonical name -> name on the disk; None where models are not written in this format.
        write_extras: writes the configuration of a model beside its tokenizer's files; given what of the language
            model's config differs (vocabulary and dtype as written).
        has_image_token: whether prompts carry the image token's id, so that the embedding needs its row.
        names_parts: whether a directory may name a tower or a language model that lies elsewhere.
        options: by key, what `--format-option KEY=VALUE` may say of a directory.
        look: what an inspection tells of a directory, quickly; None, or where it gives None: that opens it.
    """

    name: str
    families: tuple[str, ...]
    recognises: Callable[[Path, dict[str, Any]], bool]
    open: Callable[["ModelFolder", ExternalParts], ForeignModel]
    disk_name: Callable[[str], str] | None = None
    write_extras: Callable[[Path, Target, dict[str, Any]], None] | None = None
    has_image_token: bool = False
    names_parts: bool = False
    options: Mapping[str, FormatOption] = field(default_factory=dict)
    look: Callable[["ModelFolder"], FolderLook | None] | None = None


RECORD_FILE = "megatron_vlm.json"  # beside exported weights: `AskedAs`
FORMATS: Registry[Format] = Registry("format")
_USUAL_TOWERS = ("clip_vision_model", "siglip_vision_model")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "image_size")
MAX_CONFIG_BYTES = 2**26  # far above any real one; Python's objects of it may take thirty times as much


@dataclass(frozen=True)
class ModelFolder:
    """A directory with its config.json, which is read once.

    Args:
        path: the directory.
        settings: what its config.json holds; nothing where there is none, or a checkpoint of ours.
        format: the one that recognises it; None: no format does.
    """

    path: Path
    settings: dict[str, Any]
    format: Format | None

    @classmethod
    def of(cls, path: Path) -> "ModelFolder":
        """Looks at a directory. Raises ConversionError for a config.json that cannot be read."""
        if os.path.lexists(path / MANIFEST) or not os.path.lexists(path / "config.json"):
            return cls(path, {}, None)
        settings = read_json(path / "config.json")
        known = map(FORMATS.get, FORMATS.names())
        return cls(path, settings, next((one for one in known if one.recognises(path, settings)), None))

    def left_open(self) -> dict[str, FormatOption]:
        """Options that the directory leaves open, by key; empty where no format recognises it."""
        options = {} if self.format is None else self.format.options
        return {key: option for key, option in options.items() if option.is_open(self.settings)}


def open_foreign(
    path: str | Path,
    format: str | None = None,
    external: ExternalParts = ExternalParts(),
    found: ModelFolder | None = None,
) -> ForeignModel:
    """A model directory of another system.

    Args:
        path: the directory, or a hub id, which is fetched.
        format: its registered name; default: the one that recognises it.
        external: where parts lie that the directory only names, and what it leaves open.
        found: the directory, where it has been looked at.

    Raises:
        ConversionError: no directory, none that a format recognises, one that is not whole, or an option that its
            format does not take.
        ConfigError: an unknown format, or a model this package does not build.
    """
    from megatron_vlm.models import hub
    from megatron_vlm.models.hf_config import with_answer_ends

    named = None if format is None else FORMATS.get(format)
    found = found or ModelFolder.of(_folder(path))
    folder, known = found.path, named or found.format
    if known is None:
        raise ConversionError(f"{folder}: no format recognises it; known: {', '.join(FORMATS.names())}")
    elsewhere = [part for part in (external.tower, external.base) if part is not None]
    if elsewhere and not known.names_parts:
        raise ConversionError(
            f"{folder}: a directory of {known.name} holds all its parts; found {', '.join(elsewhere)}"
        )
    _check_options(known, folder, external.options)
    foreign = known.open(found, external)
    language = with_answer_ends(str(path), foreign.language, dict.fromkeys((folder, foreign.tokenizer)))
    return replace(foreign, language=language, commits={**hub.commits({str(path): folder}), **foreign.commits})


def _check_options(format: Format, folder: Path, options: Mapping[str, Any]) -> None:
    """Raises ConversionError for a key or a value that the format does not have."""
    for key, value in options.items():
        known = format.options.get(key)
        if known is None or value not in known.values:
            takes = "; ".join(f"{name}: {' or '.join(option.values)}" for name, option in format.options.items())
            raise ConversionError(
                f"{folder}: found --format-option {key}={value}; format {format.name} takes {takes or 'none'}"
            )


def is_usual(language: object, tower: object, *configs: Mapping[str, Any]) -> bool:
    """Whether parts of these model types are known well enough to be told of without transformers, and the sizes in
    their configs are sizes. Opening the directory says what is wrong with others."""
    sizes = [config[key] for config in configs for key in _SIZES if key in config]
    are_sizes = all(type(size) is int and size > 0 for size in sizes)
    return are_sizes and isinstance(language, str) and language in LANGUAGE_MODELS and tower in _USUAL_TOWERS


def is_on_hub(path: str | Path) -> bool:
    """Whether it has the form of a hub id with its owner's name, and nothing is there on this machine."""
    from megatron_vlm.models import hub

    found = hub.parse(path)
    return found is not None and "/" in found.repository


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir() and not is_on_hub(path):
        raise ConversionError(f"{path}: no such directory")
    return resolve_folder(str(path))


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


def fitting_vocabulary(language: "PretrainedConfig", source: WeightSource) -> "PretrainedConfig":
    """The config with the vocabulary of the weights: some directories pad one and not the other."""
    if EMBEDDING in source.names() and (shape := source.read(EMBEDDING).shape):
        language.vocab_size = shape[0]
    return language


def is_tied(declared: bool, source: WeightSource) -> bool:
    """Whether the head is the embedding. Where a config says so and another head is stored, transformers keeps both."""
    if not declared or HEAD not in source.names() or EMBEDDING not in source.names():
        return declared
    import torch

    return torch.equal(source.read(HEAD), source.read(EMBEDDING))


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a tokenizer's vocabulary, or what stands in its place."""
    return any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


class AskedAs(BaseModel):
    """megatron_vlm.json beside exported weights: how the model was asked in training, in a recipe's words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str
    template_arguments: dict[str, Any] = {}
    image_mode: Literal["pad", "resize", "processor"]
    video: VideoConfig = VideoConfig()
    image_token: Annotated[str, Field(min_length=1)]

    @classmethod
    def of(cls, data: Any) -> "AskedAs":
        """Takes it from a recipe's data section, or from a `ForeignModel`."""
        return cls(**{name: getattr(data, name) for name in cls.model_fields})


def asked_as(folder: Path, language: "PretrainedConfig", image_mode: str) -> AskedAs:
    """The way a directory's model is asked: as its record says; without one by `fitting_template`, in `image_mode`.

    Raises:
        ConversionError: a record that is none; as `fitting_template`.
    """
    if (recorded := recorded_in(folder)) is not None:
        return recorded
    template = fitting_template(folder, language)
    return AskedAs.model_validate({"template": template, "image_mode": image_mode, "image_token": "<image>"})


def recorded_in(folder: Path) -> AskedAs | None:
    """The content of a directory's record; None where there is none. Raises ConversionError for no record."""
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        return None
    settings = read_json(file)
    try:
        return AskedAs.model_validate(settings)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConversionError(f"{file}: {'.'.join(map(str, fault['loc']))}: {shown(fault['msg'])}") from error


def fitting_template(folder: Path, language: "PretrainedConfig") -> str:
    """`data.template` for a directory: its chat template where that can be rendered, or one of ours that says the same;
    LLaVA's own where there is none.

    LLaVA's processors have templates over typed parts, which say neither LLaVA's system text nor where an answer ends.
    Those that write down turns of `vicuna_v1` or `llama_3` were trained with these.

    Raises:
        ConversionError: a template that shows neither a text nor a text in typed parts, or one that cannot be read.
    """
    file, program, special = _chat_template(folder)
    if not program:
        return "vicuna_v1" if language.model_type == "llama" else "auto"
    from megatron_vlm.data.text.jinja import content_form, render_question

    try:
        form = content_form(program, special)
    except LimitError as error:
        raise ConversionError(f"{file}: the chat template is refused: {error}") from error
    if form is None:
        raise ConversionError(
            f"{file}: the chat template shows no content of a user's message, neither a text nor a list of typed "
            "parts; needs one that takes messages of roles user and assistant"
        )
    said = render_question(program, form, special)
    if form == "parts" and "USER:" in said and "ASSISTANT:" in said:
        return "vicuna_v1"
    if form == "parts" and "<|start_header_id|>user<|end_header_id|>" in said:
        return "llama_3"
    return "auto"


def _chat_template(folder: Path) -> tuple[Path, str, dict[str, str]]:
    """(file, template, special tokens it may put in) of a directory, the template empty where there is none."""
    settings = folder / "tokenizer_config.json"
    known = read_json(settings) if os.path.lexists(settings) else {}
    special = {name: _text_of(known.get(name), f"<{name}>") for name in ("bos_token", "eos_token", "pad_token")}
    jinja = folder / "chat_template.jinja"  # the first that transformers looks for
    try:
        if os.path.lexists(jinja) and (program := read_text(jinja, MAX_CONFIG_BYTES)):
            return jinja, program, special
    except OSError as error:
        raise ConversionError(f"{jinja}: cannot be read: {one_line(error)}") from error
    former = folder / "chat_template.json"
    for path, holder in ((settings, known), (former, read_json(former) if os.path.lexists(former) else {})):
        if program := _default_of(holder.get("chat_template")):
            return path, program, special
    return jinja, "", special


def _default_of(programs: object) -> str:
    """A template, or of several by name, in either form transformers knows, the default; empty where there is none."""
    if isinstance(programs, list):
        programs = {entry.get("name"): entry.get("template") for entry in programs if isinstance(entry, dict)}
    if isinstance(programs, dict):
        programs = programs.get("default")
    return programs if isinstance(programs, str) else ""


def _text_of(token: object, absent: str) -> str:
    """A special token of a tokenizer's config, written as a text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else absent
