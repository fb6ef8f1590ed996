"""The pixels a tower was trained on: size, mean, standard deviation, and how a picture is brought to them.

They come from the preprocessor config beside the weights. Where there is none (a tower built from a config dictionary)
the model type's usual one is made up. For image modes `pad` and `resize` only its numbers are read; mode `processor`
runs the transformers class it names, in the form that needs Pillow alone (`CLIPImageProcessorPil`).

Hazard: the class a config names without `Pil` wants torchvision, and transformers takes it silently where that is
installed; its resize gives other pixels.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from megatron_vlm.models.hf_config import MAX_SIZES, find_directory, read_settings, told
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.runtime.logging import get_logger

Channels = tuple[float, float, float]
_KEY = "model.vision"
_EDGES = ("height", "width", "shortest_edge")


@dataclass(frozen=True)
class Usual:
    """How the towers of a model type are fed. `resized`: of the shortest edge to the side of the square that is cropped
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
    """height, width in pixels; mean and std per RGB channel, of values in 0..1; processor as in `MediaSpec`."""

    height: int
    width: int
    mean: Channels
    std: Channels
    processor: str


def pixel_format(path: str | None, tower: PretrainedConfig) -> PixelFormat:
    """The pixels the tower takes.

    Args:
        path: directory or hub id of the weights, or None for a tower from a config dictionary.
        tower: its transformers config.
    Raises:
        ConfigError: where the preprocessor config or the tower's config gives no usable size.
    """
    usual = USUAL.get(tower.model_type, USUAL_CLIP)
    settings = _preprocessor_settings(path) if path is not None else {}
    for key in ("size", "crop_size"):
        _refuse_huge(key, settings.get(key))
    size: Any = settings.get("size")
    if settings.get("do_center_crop") and settings.get("crop_size") is not None:
        size = settings["crop_size"]
    if size is None:
        size = getattr(tower, "image_size", None)
    height, width = _height_width(size, path or tower.model_type)
    mean = _channels("image_mean", settings.get("image_mean", usual.mean), is_divisor=False)
    std = _channels("image_std", settings.get("image_std", usual.std), is_divisor=True)
    settings = settings or _usual_settings(usual, height, width)
    if "feature_extractor_type" in settings:  # as transformers called them until 4.26
        former = str(settings["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
        settings = {"image_processor_type": former, **settings}
    settings = {"image_processor_type": usual.processor_type, **settings}
    return PixelFormat(height, width, mean, std, json.dumps(settings, sort_keys=True))


def write_pixel_format(directory: Path, spec: MediaSpec) -> None:
    """Writes the preprocessor config that `pixel_format` reads back, beside a tower's config."""
    settings = json.dumps(json.loads(spec.processor), indent=1)
    (directory / "preprocessor_config.json").write_text(settings, encoding="utf-8")


def load_processor(spec: MediaSpec) -> Any:
    """The transformers image processor the tower's preprocessor config names, from Pillow pictures to pixels.

    Raises:
        ConfigError: there is no form of it that works on Pillow alone, its settings are refused, or what it makes is
            not of the one size the tower takes.
    """
    settings = json.loads(spec.processor)
    name = str(settings["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
    key = "data.image_mode: found processor, but the tower's"
    class_ = getattr(transformers, f"{name}Pil", None)
    if class_ is None:
        raise ConfigError(f"{key} image processor {name} has no form for Pillow in transformers; needs pad or resize")
    oblong = Image.new("RGB", (2 * spec.width + 7, spec.height + 3))
    with told(f"{key} image processor {name} refuses its own settings"):
        processor = class_.from_dict(settings)
        found = tuple(processor(oblong)["pixel_values"][0].shape)
    if found != (3, spec.height, spec.width):
        raise ConfigError(
            f"{key} image processor {name} makes pixels {found} of a picture of {oblong.width} x {oblong.height}; "
            f"the tower takes {(3, spec.height, spec.width)} of every one, so needs pad or resize"
        )
    return processor


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


def _preprocessor_settings(path: str) -> dict[str, Any]:
    """What transformers would read: a whole processor's config where it has one of pictures, else the preprocessor's.

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


def _height_width(size: Any, source: str) -> tuple[int, int]:
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


def _channels(key: str, values: Any, is_divisor: bool) -> Channels:
    """Raises ConfigError for what is no three numbers, or a divisor among them that is not above 0."""
    is_list = isinstance(values, list | tuple) and len(values) == 3
    if not is_list or not all(type(v) in (int, float) and (v > 0 or not is_divisor) for v in values):
        more = " above 0" if is_divisor else ""
        raise ConfigError(f"{_KEY}: {key} is {values!r}, needs three numbers{more}, of red, green and blue")
    red, green, blue = (float(v) for v in values)
    return red, green, blue
