"""The pixels a tower was trained on: size, mean and standard deviation.

They come from the preprocessor config beside the weights. Where there is none (a tower built from a config dictionary)
the model type's usual values are taken. Only the dictionary is read: transformers' image processor classes are not
needed, and some of them want torchvision.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.runtime.logging import get_logger

# Statistics by model type; every other type gets CLIP's.
USUAL_STATISTICS = {
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class PixelFormat:
    """height, width in pixels; mean and std per RGB channel, of values in 0..1."""

    height: int
    width: int
    mean: Channels
    std: Channels


def pixel_format(path: str | None, tower: PretrainedConfig) -> PixelFormat:
    """The pixels the tower takes.

    Args:
        path: directory or hub id of the weights, or None for a tower from a config dictionary.
        tower: its transformers config.
    Raises:
        ConfigError: where the preprocessor config or the tower's config gives no usable size.
    """
    mean, std = USUAL_STATISTICS.get(tower.model_type, (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    settings = _preprocessor_settings(path) if path is not None else {}
    size: Any = settings.get("size")
    if settings.get("do_center_crop") and settings.get("crop_size") is not None:
        size = settings["crop_size"]
    if size is None:
        size = getattr(tower, "image_size", None)
    height, width = _height_width(size, path or tower.model_type)
    mean, std = settings.get("image_mean", mean), settings.get("image_std", std)
    return PixelFormat(height, width, _channels(mean), _channels(std))


def write_pixel_format(directory: Path, spec: MediaSpec) -> None:
    """Writes the preprocessor config that `pixel_format` reads back, beside a tower's config."""
    settings = {
        "size": {"height": spec.height, "width": spec.width},
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _preprocessor_settings(path: str) -> dict[str, Any]:
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        get_logger(__name__).info("no preprocessor config at %s: using the model type's usual statistics", path)
        return {}
    return settings


def _height_width(size: Any, source: str) -> tuple[int, int]:
    """Reads the forms transformers knows: a number, a pair, {height, width}, {shortest_edge} (square)."""
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        size = (size["height"], size["width"])
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ConfigError(f"model.vision: image size of {source} is {size!r}; a number or height and width is needed")
    return int(size[0]), int(size[1])


def _channels(values: Any) -> Channels:
    red, green, blue = (float(v) for v in values)
    return red, green, blue
