"""`llava`: a directory of the original LLaVA-1.5 code.

Its config.json is the language model's with `mm_*` keys. The tower is inside the weight files, or only named by
`mm_vision_tower`; a first training phase leaves just `mm_projector.bin` and a config that names the language model.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.conversion.formats.base import (
    FORMATS,
    ExternalParts,
    FolderLook,
    ForeignModel,
    Format,
    FormatOption,
    ModelFolder,
    Target,
    asked_as,
    fitting_vocabulary,
    has_tokenizer,
    is_tied,
    is_usual,
    read_json,
    with_rope_of_4,
)
from megatron_vlm.conversion.mappings import projector_name
from megatron_vlm.conversion.weights.files import PickleFile
from megatron_vlm.conversion.weights.sources import (
    FolderSource,
    JoinedSource,
    StateSource,
    WeightSource,
    resolve_folder,
    vision_rename,
)
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.architectures import LANGUAGE_MODELS, types_by_llava_name

if TYPE_CHECKING:  # a directory is looked at without it
    from transformers import PretrainedConfig

NAME = "llava"
PROJECTOR_FILE = "mm_projector.bin"
IMAGE_MODES = {"pad": "pad", "square": "processor", None: "processor"}  # image_aspect_ratio -> data.image_mode
FEATURES = {"patch": "patch", "cls_patch": "cls_patch"}
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
TOWER_FOLDER = "vision_tower"  # in a directory that is written
TOWER_INSIDE = {"unfreeze_mm_vision_tower": True}  # only then the original code takes a tower from the weight files
_TOWERS = ("model.vision_tower.vision_tower.", "model.vision_tower.")  # prefixes, the inner vision_model. aside
DOWNSAMPLE = "mlp_downsample"  # a name of two projectors, which differ in the order of the squares
ORDERS = {"column": "mlp_downsample", "row": "mlp_downsample_2x2_fix"}  # order -> registered type
ORDER_OPTION = "downsample_order"
ORDER_KEY = "mm_downsample_order"  # ours, in a config that is written here; VILA's code passes over it
CARRIED_CONFIG = Path("origin/files/config.json")  # of a checkpoint: as the model came with (`origin`)
_LAYER = re.compile(r"linear_(\d+)\.(.*)")
KNOWN_TOWERS: dict[str, dict[str, Any]] = {  # configs of the towers that LLaVA's directories name and may contain
    "openai/clip-vit-large-patch14-336": {"model_type": "clip_vision_model", "image_size": 336},
    "openai/clip-vit-large-patch14": {"model_type": "clip_vision_model", "image_size": 224},
}
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}


def recognises(folder: Path, settings: dict[str, Any]) -> bool:
    """Every config of LLaVA names its tower."""
    return "mm_vision_tower" in settings


def open_folder(found: ModelFolder, external: ExternalParts) -> ForeignModel:
    """Raises ConversionError, ConfigError as `open_foreign`."""
    from megatron_vlm.conversion.weights.tower_names import TowerNames
    from megatron_vlm.models import hub
    from megatron_vlm.models.hf_config import with_answer_ends

    folder, settings = found.path, found.settings
    image_mode, feature = _checked(folder, settings)
    projector = _projector(folder, settings, external.options.get(ORDER_OPTION))
    alone = _is_projector_alone(folder)
    if external.base is not None and not alone:
        raise ConversionError(f"{folder} holds a language model; found another at {external.base}, needs none")
    base_named, base = _base_of(folder, settings, external.base) if alone else (str(folder), folder)
    own = FolderSource(str(base), lambda names: canonical_name)
    parts: list[WeightSource] = [own]
    if alone:
        file = PickleFile(folder / PROJECTOR_FILE)
        state = {name: file.read(name) for name in file.names()}
        parts.append(StateSource(str(file.path), state, canonical_name))
    reference = external.tower or settings["mm_vision_tower"]
    tower_folder = _tower_folder(folder, reference)
    holds_tower = _holds_tower(own)
    if not holds_tower:
        tower_folder = tower_folder or resolve_folder(reference)
    vision = _tower(folder, reference, tower_folder)
    names = TowerNames(vision)
    if not holds_tower:
        parts.append(FolderSource(str(tower_folder), names.rename_folder))
    elif names.are_renamed:
        own = FolderSource(str(base), lambda _: names.canonical_of(canonical_name))
        parts[0] = own
    named = {base_named: base} | ({} if tower_folder is None else {reference: tower_folder})
    source = parts[0] if len(parts) == 1 else JoinedSource(str(folder), parts)
    tokenizer = folder if has_tokenizer(folder) else base
    language = _language(base, settings, alone)
    if alone and tokenizer != base:  # else `open_foreign` looks there
        language = with_answer_ends(str(base), language, [base])
    language.tie_word_embeddings = is_tied(bool(language.tie_word_embeddings), source)
    asked = asked_as(tokenizer, language, image_mode)
    return ForeignModel(
        format=NAME,
        folder=folder,
        language=fitting_vocabulary(language, source),
        vision=vision,
        vision_path=tower_folder,
        projector=projector,
        select_layer=settings.get("mm_vision_select_layer", -2),
        select_feature=feature,
        source=source,
        tokenizer=tokenizer,
        image_token=asked.image_token,
        template=asked.template,
        template_arguments=asked.template_arguments,
        image_mode=asked.image_mode,
        video=asked.video,
        own=None if alone else own,
        commits=hub.commits(named),
    )


def look(found: ModelFolder) -> FolderLook | None:
    """Its parts, as config.json and headers say; None of a projector alone, whose file torch must read, and of a tower
    that is not known. Raises as `open_foreign`."""
    folder, settings = found.path, found.settings
    _checked(folder, settings)
    _projector(folder, settings, ORDER.values[0] if _leaves_order_open(settings) else None)
    reference = settings["mm_vision_tower"]
    tower_folder = _tower_folder(folder, reference)
    if _is_projector_alone(folder):
        return None
    tower = KNOWN_TOWERS.get(reference, {}) if tower_folder is None else _nested_config(tower_folder)
    language = _language_type(folder, settings)
    if not is_usual(language, tower.get("model_type"), settings, tower):
        return None
    own = FolderSource(str(folder), lambda names: canonical_name)
    if _holds_tower(own):
        return FolderLook(language, tower["model_type"], (own,))
    tower_folder = tower_folder or resolve_folder(reference)
    return FolderLook(
        language, tower["model_type"], (own, FolderSource(str(tower_folder), vision_rename)), tower_folder
    )


def _nested_config(folder: Path) -> dict[str, Any]:
    """The vision model's config in a directory that may hold a larger model; empty where there is none."""
    file = folder / "config.json"
    settings = read_json(file) if os.path.lexists(file) else {}
    vision = settings.get("vision_config", settings)
    return vision if isinstance(vision, dict) else {}


def tower_elsewhere(found: ModelFolder) -> str | None:
    """The tower that a directory of whole weights names and that would have to be fetched. Raises as `open_foreign`."""
    folder, settings = found.path, found.settings
    _checked(folder, settings)
    reference = str(settings["mm_vision_tower"])
    if _is_projector_alone(folder) or _tower_folder(folder, reference) is not None:
        return None
    return None if _holds_tower(FolderSource(str(folder), lambda names: canonical_name)) else reference


def _holds_tower(own: FolderSource) -> bool:
    return any(name.startswith("vision_tower.") for name in own.names())


def canonical_name(name: str) -> str:
    """Canonical name of a tensor on the disk. Anything may stand before `mm_projector.` in a projector's own file."""
    _, found, rest = name.partition("mm_projector.")
    if found:
        return projector_name(rest)
    for prefix in _TOWERS:
        if name.startswith(prefix):
            return f"vision_tower.{name.removeprefix(prefix).removeprefix('vision_model.')}"
    return name


def disk_name(name: str) -> str:
    """Canonical -> on the disk."""
    part, _, rest = name.partition(".")
    if part == "vision_tower":
        return TOWER + rest
    if part == "multi_modal_projector":
        layer = _LAYER.fullmatch(rest)
        return PROJECTOR + (f"{2 * (int(layer[1]) - 1)}.{layer[2]}" if layer else rest)
    return name


def _leaves_order_open(settings: dict[str, Any]) -> bool:
    return settings.get("mm_projector_type") == DOWNSAMPLE and settings.get(ORDER_KEY) is None


ORDER = FormatOption(
    values=tuple(ORDERS),
    about="its squares come column by column in VILA 1.5 and NaVILA, and row by row in VILA's main branch",
    is_open=_leaves_order_open,
)


def told_order(settings: dict[str, Any], projector: str) -> dict[str, str]:
    """The config's key for what it leaves open of its squares; nothing where it says it, or has none.

    The name stays: whoever read the directory before reads it the same now, whichever order that code has.

    Args:
        settings: config.json.
        projector: the registered type it was read as.
    """
    return _order_key(projector) if _leaves_order_open(settings) else {}


def _order_key(projector: str) -> dict[str, str]:
    order = next((order for order, ours in ORDERS.items() if ours == projector), None)
    return {} if order is None else {ORDER_KEY: order}


def _projector(folder: Path, settings: dict[str, Any], order: str | None) -> str:
    """The registered type. Raises ConversionError where the order of the squares is not known, or known twice."""
    name: str = settings.get("mm_projector_type", "linear")
    own = settings.get(ORDER_KEY)
    if name != DOWNSAMPLE:
        if order is not None:
            raise ConversionError(
                f"{folder}/config.json: mm_projector_type is {name!r}; found --format-option "
                f"{ORDER_OPTION}={order}, needs none"
            )
        return name
    if own is not None and (own not in ORDERS or order not in (None, own)):
        needs = own if own in ORDERS else " or ".join(ORDERS)
        raise ConversionError(f"{folder}/config.json: {ORDER_KEY} is {own!r}, asked for {order!r}, needs {needs}")
    if own is None and order is None:
        raise ConversionError(
            f"{folder}/config.json: mm_projector_type is {DOWNSAMPLE!r} and {ORDER_KEY} is not there: {ORDER.about}; "
            f"needs --format-option {ORDER_OPTION}={' or '.join(ORDERS)} (of load: format_options)"
        )
    return ORDERS[own or str(order)]


def _written_projector(target: Target) -> dict[str, str]:
    """`mm_projector_type` as it came, where it is the same projector; of squares, their order too."""
    kind = target.config.model.projector.type
    key = _order_key(kind)
    if not key:
        return {"mm_projector_type": kind}
    carried = target.checkpoint / CARRIED_CONFIG
    came = read_json(carried).get("mm_projector_type") if os.path.lexists(carried) else None
    return {"mm_projector_type": DOWNSAMPLE if came == DOWNSAMPLE else kind, **key}


def _checked(folder: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """Image mode and feature. Raises ConversionError for what this package does not build."""

    def refuse(key: str, needs: str) -> ConversionError:
        return ConversionError(f"{folder}/config.json: {key} is {settings.get(key)!r}, needs {needs}")

    if settings.get("image_aspect_ratio") not in tuple(IMAGE_MODES):  # of a value that may have no hash
        raise refuse("image_aspect_ratio", "pad or square")
    feature = settings.get("mm_vision_select_feature", "patch")
    if feature not in tuple(FEATURES):
        raise refuse("mm_vision_select_feature", " or ".join(FEATURES))
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if settings.get(key):
            raise refuse(key, "false")
    if not isinstance(settings.get("mm_vision_tower"), str):
        raise refuse("mm_vision_tower", "a directory or a hub id")
    if not isinstance(settings.get("mm_vision_select_layer", -2), int):
        raise refuse("mm_vision_select_layer", "a number")
    if not isinstance(settings.get("mm_projector_type", "linear"), str):
        raise refuse("mm_projector_type", "a projector's name")
    return IMAGE_MODES[settings.get("image_aspect_ratio")], FEATURES[feature]


def _is_projector_alone(folder: Path) -> bool:
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return not weights and os.path.lexists(folder / PROJECTOR_FILE)


def _base_of(folder: Path, settings: dict[str, Any], place: str | None) -> tuple[str, Path]:
    """The base model as it is named, and its folder. Raises ConversionError."""
    base = place or settings.get("_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConversionError(
            f"{folder} holds {PROJECTOR_FILE} alone and its config.json names no language model: _name_or_path is "
            f"{base!r}, needs a directory or a hub id (or --base)"
        )
    return base, resolve_folder(base)


def _language(base: Path, settings: dict[str, Any], alone: bool) -> "PretrainedConfig":
    from megatron_vlm.models.hf_config import config_from_dict, config_from_path, known_keys

    if alone:
        return config_from_path(str(base), str(base))
    kind = _language_type(base, settings)
    known = known_keys(kind) - {"architectures", "model_type"}
    own = {key: value for key, value in settings.items() if key in known}
    return config_from_dict(f"{base}/config.json", {**own, "model_type": kind})


def _language_type(base: Path, settings: dict[str, Any]) -> str:
    """The language model's type, by the name of LLaVA's class. Raises ConversionError."""
    named = str(settings.get("architectures") or settings.get("model_type")).lower()
    languages = types_by_llava_name()
    found = [part for part in languages if part in named]
    if not found:
        raise ConversionError(
            f"{base}/config.json: architectures is {settings.get('architectures')!r}, needs one of LLaVA over "
            f"{' or '.join(languages)}"
        )
    return languages[max(found, key=len)]  # one name may begin another


def _tower_folder(folder: Path, reference: str) -> Path | None:
    """Folder of the tower that a config names, from the current directory or the model's."""
    return next((path for path in (Path(reference), folder / reference) if path.is_dir()), None)


def _tower(folder: Path, reference: str, tower_folder: Path | None) -> "PretrainedConfig":
    from transformers import AutoConfig

    from megatron_vlm.models.hf_config import config_from_path

    if tower_folder is None and reference in KNOWN_TOWERS:
        return AutoConfig.for_model(**KNOWN_TOWERS[reference], **_CLIP_LARGE)
    place = reference if tower_folder is None else str(tower_folder)
    config = config_from_path(f"{folder}/config.json: mm_vision_tower", place)
    return getattr(config, "vision_config", config)


def write_extras(folder: Path, target: Target, settings: dict[str, Any]) -> None:
    """config.json, and the tower's configs under `vision_tower`, which it names; the tower is in the weight files.

    Raises:
        ConversionError: an image mode, or a language model, that the original code does not have.
    """
    from megatron_vlm.models.vision.pixels import write_pixel_format

    model, data = target.config.model, target.config.data
    modes = {ours: theirs for theirs, ours in IMAGE_MODES.items() if theirs is not None}
    if data.image_mode not in modes:
        raise ConversionError(f"{NAME} prepares images by {' or '.join(modes)}; this model has {data.image_mode}")
    name = LANGUAGE_MODELS.get(target.language.model_type).llava_name
    types_by_llava_name()  # a name that two have would be read as the first's
    if name is None:
        raise ConversionError(f"{NAME} has no name for a language model of type {target.language.model_type}")
    config = {
        **with_rope_of_4(target.language.to_dict()),
        **settings,
        "torch_dtype": settings["dtype"],
        "architectures": [f"Llava{name}ForCausalLM"],
        "model_type": f"llava_{name.lower()}",
        "image_aspect_ratio": modes[data.image_mode],
        "mm_hidden_size": target.vision.hidden_size,
        **_written_projector(target),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": model.vision.select_feature,
        "mm_vision_select_layer": model.vision.select_layer,
        "mm_vision_tower": TOWER_FOLDER,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        **TOWER_INSIDE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    shutil.copytree(target.checkpoint / "vision", folder / TOWER_FOLDER)
    write_pixel_format(folder / TOWER_FOLDER, target.media, data.image_mode)


FORMATS.register(NAME)(
    Format(
        NAME,
        ("llava",),
        recognises,
        open_folder,
        disk_name,
        write_extras,
        names_parts=True,
        options={ORDER_OPTION: ORDER},
        look=look,
    ),
)
