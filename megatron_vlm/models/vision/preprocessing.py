"""The pixels a tower was trained on: size, filter, mean, standard deviation, and how an image is brought to them.

They come from the preprocessor config beside the weights, and from nowhere else; `model.vision.preprocessor` of the
recipe may change single keys of it. A key that it lacks is the one of the transformers class that it names, as
transformers has it. Where there is no config (a tower built from a config dictionary) the model type's usual one is
made up. Image mode `processor` runs that class, in the form that needs Pillow alone (`CLIPImageProcessorPil`); `pad`
and `resize` follow its numbers (`pixels.py`).

Hazard: the class a config names without `Pil` wants torchvision, and transformers takes it silently where that is
installed; its resize gives other pixels.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import PretrainedConfig
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from megatron_vlm.errors import ConfigError
from megatron_vlm.models import hub
from megatron_vlm.models.hf_config import MAX_SIZES, check_numbers, find_directory, read_settings, told
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.logging import get_logger

Channels = tuple[float, float, float]
_KEY = "model.vision"
KEYS = ("image_processor_type", "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size",
        "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad")  # fmt: skip
GEOMETRY = ("size", "do_center_crop", "crop_size")  # how an image becomes the tower's square
_EDGES = ("height", "width", "shortest_edge")


@dataclass(frozen=True)
class Usual:
    """Usual pixels of a model type's towers. `resized`: of the shortest edge to the side of the square that is cropped
    from the middle; 0 where the aspect ratio is let go instead."""

    processor_type: str
    mean: Channels
    std: Channels
    resized: float


USUAL_CLIP = Usual("CLIPImageProcessor", tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD), 1.0)
USUAL_DINO = Usual("BitImageProcessor", tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD), 256 / 224)
USUAL = {  # every other model type is fed as CLIP's
    "siglip_vision_model": Usual(
        "SiglipImageProcessor", tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD), 0.0
    ),
    "vit": Usual("ViTImageProcessor", tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD), 0.0),
    "dinov2": USUAL_DINO,
    "dinov2_with_registers": USUAL_DINO,
}


@dataclass(frozen=True)
class PixelFormat:
    """height, width in pixels; mean and std per RGB channel, of values in 0..1; is_usual: no key of `GEOMETRY` is
    stated; all as in `MediaSpec`."""

    height: int
    width: int
    mean: Channels
    std: Channels
    processor: str
    resample: Image.Resampling = Image.Resampling.BICUBIC
    is_usual: bool = False


@dataclass(frozen=True)
class TowerConfigs:
    """A tower's configs, each file of its directory read once.

    Args:
        hf_config: of the vision model alone.
        preprocessor: the preprocessor config beside it; empty where there is none.
        path: the directory or hub id, None for a tower from a config dictionary.
    """

    hf_config: PretrainedConfig
    preprocessor: Mapping[str, Any]
    path: str | None


def pixel_format(tower: TowerConfigs, instead: Mapping[str, Any] | None = None) -> PixelFormat:
    """The pixels the tower takes.

    Args:
        tower: what its directory says.
        instead: what takes the place of keys of the preprocessor config (`model.vision.preprocessor`).

    Raises:
        ConfigError: where the preprocessor config or the tower's config gives no usable size, mean, deviation or
            filter.
    """
    usual = USUAL.get(tower.hf_config.model_type, USUAL_CLIP)
    instead = dict(instead or {})
    _check_keys(instead)
    stated = tower.preprocessor
    settings = {**stated, **instead}
    for key in ("size", "crop_size"):
        _refuse_huge(key, settings.get(key))
    size: Any = settings.get("size")
    if settings.get("do_center_crop") and settings.get("crop_size") is not None:
        size = settings["crop_size"]
    if size is None:
        size = getattr(tower.hf_config, "image_size", None)
    height, width = height_width(size, tower.path or tower.hf_config.model_type)
    if not stated:
        settings = {**_usual_settings(usual, height, width), **instead}
    if "feature_extractor_type" in settings:  # as transformers called them until 4.26
        former = str(settings["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
        settings = {"image_processor_type": former, **settings}
    settings = {"image_processor_type": usual.processor_type, **settings}
    mean = _channels("image_mean", setting(settings, "image_mean", usual.mean), is_divisor=False)
    std = _channels("image_std", setting(settings, "image_std", usual.std), is_divisor=True)
    resample = _filter(setting(settings, "resample", Image.Resampling.BICUBIC))
    processor, is_usual = json.dumps(settings, sort_keys=True), not {*stated, *instead}.intersection(GEOMETRY)
    return PixelFormat(height, width, mean, std, processor, resample, is_usual)


def setting(settings: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    """The setting that transformers goes by: the preprocessor config's, its class's, or, without one, `otherwise`."""
    if key in settings:
        return settings[key]
    value = getattr(_processor_class(settings), key, None)
    return otherwise if value is None else value


def _processor_class(settings: Mapping[str, Any]) -> Any:
    """The class a config names, in its form for Pillow; None where there is none."""
    name = str(settings.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    return getattr(transformers, f"{name}Pil", None)


def load_processor(spec: MediaSpec | PixelFormat) -> Any:
    """The transformers image processor the tower's preprocessor config names, from Pillow images to pixels.

    Raises:
        ConfigError: there is no form of it that works on Pillow alone, its settings are refused, or what it makes is
            not of the one size the tower takes.
    """
    settings = json.loads(spec.processor)
    name = str(settings["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
    key = "data.image_mode: found processor, but the tower's"
    class_ = _processor_class(settings)
    if class_ is None:
        raise ConfigError(f"{key} image processor {name} has no form for Pillow in transformers; needs pad or resize")
    oblong = Image.new("RGB", (2 * spec.width + 7, spec.height + 3))
    with told(f"{key} image processor {name} refuses its own settings"):
        processor = class_.from_dict(settings)
        found = tuple(processor(oblong)["pixel_values"][0].shape)
    if found != (3, spec.height, spec.width):
        raise ConfigError(
            f"{key} image processor {name} makes pixels {found} of an image of {oblong.width} x {oblong.height}; "
            f"the tower takes {(3, spec.height, spec.width)} of every one, so needs pad or resize"
        )
    return processor


def made_by_class(settings: Mapping[str, Any], image: Image.Image) -> Any:
    """Pixels that the class of a preprocessor config makes of one image; None where it has no form for Pillow.
    Raises ConfigError where it refuses its settings, or the image."""
    if (class_ := _processor_class(settings)) is None:
        return None
    with told(f"{_KEY}: image processor {class_.__name__} refuses its own settings"):
        return np.asarray(class_.from_dict(dict(settings))(image)["pixel_values"][0], dtype=np.float32)


def _usual_settings(usual: Usual, height: int, width: int) -> dict[str, Any]:
    """The preprocessor config such a tower would have beside its weights."""
    settings: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    settings |= {"resample": int(Image.Resampling.BICUBIC), "rescale_factor": 1 / 255}
    settings |= {"image_mean": list(usual.mean), "image_std": list(usual.std)}
    whole = {"height": height, "width": width}
    if not usual.resized:
        return settings | {"size": whole}
    edge = round(max(height, width) * usual.resized)
    return settings | {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": whole}


def read_preprocessor(path: str) -> dict[str, Any]:
    """The preprocessor config at a directory or hub id, as transformers would read it: a whole processor's config where
    it has one of images, else the preprocessor's; empty where there is none.

    Raises:
        ConfigError: one that is there and cannot be used.
    """
    folder = find_directory(_KEY, path, hub.PREPROCESSOR_FILES)
    files = [folder / name for name in hub.PREPROCESSOR_FILES]
    own, whole = (read_settings(_KEY, file) if os.path.lexists(file) else {} for file in files)
    settings = whole.get("image_processor", own)
    if not isinstance(settings, dict):
        raise ConfigError(f"{_KEY}: image_processor in {str(files[1])!r} is {settings!r}, needs an object")
    if not settings:
        get_logger(__name__).info("no preprocessor config at %s: using the model type's usual one", path)
    return settings


def height_width(size: Any, source: str) -> tuple[int, int]:
    """Reads the forms transformers knows: a number, a pair, {height, width}, {shortest_edge} (square)."""
    found = size
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        size = (size["height"], size["width"])
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(map(_is_edge, size)):
        raise ConfigError(
            f"{_KEY}: image size of {source} is {found!r}; a number or height and width is needed, each from 1 to "
            f"{MAX_SIZES['image_size']}"
        )
    return int(size[0]), int(size[1])


def _refuse_huge(key: str, size: Any) -> None:
    """Raises ConfigError for an edge that transformers' class would make, and the memory has no room for."""
    edges = {name: size[name] for name in _EDGES if name in size} if isinstance(size, dict) else {key: size}
    for name, edge in edges.items():
        if isinstance(edge, int | float) and not _is_edge(edge):
            most = MAX_SIZES["image_size"]
            raise ConfigError(f"{_KEY}: {name} of the preprocessor config's {key} is {edge}, needs 1 to {most}")


def _is_edge(pixels: Any) -> bool:
    is_number = isinstance(pixels, int | float) and not isinstance(pixels, bool) and pixels == int(pixels)
    return is_number and 1 <= pixels <= MAX_SIZES["image_size"]


def _check_keys(instead: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key that no preprocessor config here is read for, or a number that is none."""
    check_numbers(f"{_KEY}.preprocessor", instead)
    for key in instead:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS, f"needs one of {', '.join(KEYS)}")
            raise ConfigError(f"{_KEY}.preprocessor: found the key {key!r}, {hint}")


def _filter(code: Any) -> Image.Resampling:
    """Raises ConfigError for what is no code of Pillow's."""
    if type(code) is int or isinstance(code, Image.Resampling):
        with suppress(ValueError):
            return Image.Resampling(code)
    codes = ", ".join(f"{int(known)} ({known.name.lower()})" for known in sorted(Image.Resampling))
    raise ConfigError(f"{_KEY}: resample of the preprocessor config is {code!r}, needs one of {codes}")


def _channels(key: str, values: Any, is_divisor: bool) -> Channels:
    """Raises ConfigError for what is no three numbers, or a divisor among them that is not above 0."""
    is_list = isinstance(values, list | tuple) and len(values) == 3
    if not is_list or not all(type(v) in (int, float) and (v > 0 or not is_divisor) for v in values):
        more = " above 0" if is_divisor else ""
        raise ConfigError(f"{_KEY}: {key} is {values!r}, needs three numbers{more}, of red, green and blue")
    red, green, blue = (float(v) for v in values)
    return red, green, blue
