"""`llava-hf`: a directory of transformers' LlavaForConditionalGeneration, with the names before and since 4.52.

Hazard: `vision_feature_select_strategy: default` drops the first token of any tower, CLS or patch; our `patch` drops
what comes before the patches. They are one only for towers with one leading token, as CLIP's.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.conversion.formats.base import (
    FORMATS,
    ExternalParts,
    FolderLook,
    ForeignModel,
    Format,
    ModelFolder,
    Target,
    asked_as,
    fitting_vocabulary,
    is_tied,
    is_usual,
    read_json,
    with_rope_of_4,
)
from megatron_vlm.conversion.mappings import canonical_name
from megatron_vlm.conversion.weights.sources import FolderSource
from megatron_vlm.errors import ConversionError

NAME = "llava-hf"
FEATURES = {"default": "patch", "full": "cls_patch"}  # vision_feature_select_strategy -> model.vision.select_feature
_DEFAULTS = {  # of transformers' class, for the keys that are checked here
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
}
PROJECTOR = "mlp2x_gelu"  # the only one the class has
# Canonical prefix -> the one on the disk: what every version of transformers reads, and what 5.x writes.
DISK_PREFIXES = (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))


def recognises(folder: Path, settings: dict[str, Any]) -> bool:
    """LLaVA's own early directories have the same model type, but no nested configs."""
    return settings.get("model_type") == "llava" and isinstance(settings.get("vision_config"), dict)


def open_folder(found: ModelFolder, _: ExternalParts) -> ForeignModel:
    """Raises ConversionError, ConfigError as `open_foreign`."""
    from transformers import LlavaConfig

    from megatron_vlm.conversion.weights.tower_names import TowerNames
    from megatron_vlm.models.hf_config import config_in

    folder = found.path
    config = config_in(str(folder), str(folder), folder, found.settings or None)
    if not isinstance(config, LlavaConfig):
        raise ConversionError(f"{folder}/config.json: model_type is {config.model_type!r}, needs llava")
    _check(folder, {key: getattr(config, key) for key in _DEFAULTS})
    rename = TowerNames(config.vision_config).canonical_of(canonical_name)
    source = FolderSource(str(folder), lambda names: rename)
    language = fitting_vocabulary(config.text_config, source)
    declared = bool(config.tie_word_embeddings or language.tie_word_embeddings)
    language.tie_word_embeddings = is_tied(declared, source)
    asked = asked_as(folder, language, image_mode="processor")
    return ForeignModel(
        format=NAME,
        folder=folder,
        language=language,
        vision=config.vision_config,
        vision_path=folder,
        projector=PROJECTOR,
        select_layer=config.vision_feature_layer,
        select_feature=FEATURES[config.vision_feature_select_strategy],
        drops_first_token=config.vision_feature_select_strategy == "default",
        source=source,
        tokenizer=folder,
        image_token=asked.image_token,
        template=asked.template,
        template_arguments=asked.template_arguments,
        image_mode=asked.image_mode,
        video=asked.video,
        own=source,
    )


def look(found: ModelFolder) -> FolderLook | None:
    """Its parts, as its config.json and its headers say. Raises ConversionError as `open_foreign`."""
    settings = found.settings
    language, vision = settings.get("text_config", {}), settings["vision_config"]
    if not isinstance(language, dict):
        return None
    types = language.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    if not is_usual(*types, language, vision):
        return None
    _check(found.path, {**_DEFAULTS, **settings})
    source = FolderSource(str(found.path), lambda names: canonical_name)
    return FolderLook(*types, (source,))


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConversionError for what is not built here. `settings` has the keys of `_DEFAULTS`."""
    needs = {
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
        "vision_feature_select_strategy": tuple(FEATURES),
    }
    for key, allowed in needs.items():
        if (found := settings[key]) not in allowed:
            raise ConversionError(f"{folder}/config.json: {key} is {found!r}, allowed: {', '.join(map(str, allowed))}")
    if not isinstance(settings["vision_feature_layer"], int):
        raise ConversionError(
            f"{folder}/config.json: vision_feature_layer is {settings['vision_feature_layer']!r}, needs one layer"
        )


def disk_name(name: str) -> str:
    """Canonical -> on the disk."""
    for prefix, theirs in DISK_PREFIXES:
        if name.startswith(prefix):
            return theirs + name.removeprefix(prefix)
    return name


def write_extras(folder: Path, target: Target, settings: dict[str, Any]) -> None:
    """config.json, and the processor's configuration over the tokenizer that lies there.

    Raises:
        ConversionError: a projector that transformers' class does not have, or a selection of tokens.
    """
    from transformers import LlavaConfig, LlavaProcessor

    from megatron_vlm.data.text.tokenizer import load_tokenizer

    model = target.config.model
    if model.projector.type != PROJECTOR:
        raise ConversionError(f"{NAME} has the projector {PROJECTOR} only; this model has {model.projector.type}")
    if target.num_dropped_tokens > 1:
        raise ConversionError(
            f"{NAME} drops one leading token of the tower or none; this model drops {target.num_dropped_tokens}: "
            "model.vision.select_feature is 'patch', needs 'cls_patch'"
        )
    strategy = "default" if target.num_dropped_tokens else "full"
    language = copy.deepcopy(target.language)
    language.vocab_size = settings["vocab_size"]
    config = LlavaConfig(
        text_config=language,
        vision_config=target.vision,
        image_token_id=target.image_token_id,
        image_seq_length=target.media.tokens_per_image,
        projector_hidden_act="gelu",
        vision_feature_layer=model.vision.select_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(language.tie_word_embeddings),
        architectures=["LlavaForConditionalGeneration"],
        dtype=settings["dtype"],
    )
    tokenizer = load_tokenizer(folder, target.config.data.image_token)
    config.save_pretrained(folder)
    written = read_json(folder / "config.json")
    written["text_config"] = with_rope_of_4(written["text_config"])
    (folder / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    num_leading = target.media.tokens_per_image + target.num_dropped_tokens - target.media.num_patches
    processor = LlavaProcessor(
        image_processor=_image_processor(target),
        tokenizer=tokenizer,
        patch_size=target.vision.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=tokenizer.chat_template,
        image_token=target.config.data.image_token,
        num_additional_image_tokens=num_leading,
    )
    processor.save_pretrained(folder)


def _image_processor(target: Target) -> Any:
    """One that prepares images as the checkpoint's `data.image_mode` does."""
    from transformers import LlavaImageProcessorPil

    from megatron_vlm.models.vision.pixels import plain_settings
    from megatron_vlm.models.vision.preprocessing import load_processor

    mode = target.config.data.image_mode
    if mode == "processor":
        return load_processor(target.media)
    return LlavaImageProcessorPil(**plain_settings(target.media) | {"do_pad": mode == "pad"})


FORMATS.register(NAME)(
    Format(NAME, ("llava",), recognises, open_folder, disk_name, write_extras, has_image_token=True, look=look)
)
