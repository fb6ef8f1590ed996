"""Pixels of the image modes `pad` and `resize`, which follow a tower's preprocessor config.

They have their own way to an image's shape: a square of the mean colour, or the aspect ratio let go. All else is the
config's: the filter of the resize, means and deviations. What it says beside that is refused by its name: a crop, no
normalisation, another scale. A class of transformers may have settings and steps that are its own, so the class is
asked too: of an image that is a square already it must make these pixels.

Checkpoints from before are read as they were trained (`as_it_was`): always bicubic, all else passed over.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_vlm.errors import ConfigError, one_line
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.preprocessing import (
    GEOMETRY,
    USUAL,
    USUAL_CLIP,
    PixelFormat,
    TowerConfigs,
    height_width,
    made_by_class,
    pixel_format,
    setting,
)

SCALE = 1 / 255
_TOLERANCE = 1e-4  # of a trial, in parts of the largest value: far above fp32's rounding, far below one of 255 steps


def to_pixels(image: Image.Image, spec: MediaSpec | PixelFormat) -> NDArray[np.float32]:
    """An RGB image -> pixels [3, H, W], normalised; its aspect ratio is let go."""
    image = image.resize((spec.width, spec.height), spec.resample)
    values = np.asarray(image, dtype=np.float32) / np.float32(255)  # [H, W, 3]
    mean, std = (np.asarray(channels, dtype=np.float32) for channels in (spec.mean, spec.std))
    normalised: NDArray[np.float32] = (values - mean) / std
    return normalised.transpose(2, 0, 1).copy()  # [H, W, 3] -> [3, H, W]


def refuse_unfollowed(spec: MediaSpec | PixelFormat, image_mode: str) -> None:
    """Raises ConfigError where the tower's preprocessor config says what `pad` or `resize` cannot follow, by name. A
    geometry that nobody stated is the mode's own; one whose class refuses it cannot be tried, and is not trusted."""
    if image_mode == "processor" or not spec.processor:
        return
    settings = json.loads(spec.processor)
    if spec.is_usual:
        settings |= {key: value for key, value in plain_settings(spec).items() if key in GEOMETRY}
    faults = list(_unfollowed(settings, image_mode))
    try:
        faults = faults or list(_tried(settings, spec))
    except ConfigError as refusal:
        raise ConfigError(
            f"data.image_mode: found {image_mode}, which cannot be compared with the tower's preprocessor config: "
            f"{one_line(refusal)}; needs other values under model.vision.preprocessor"
        ) from refusal
    if faults:
        raise ConfigError(
            f"data.image_mode: found {image_mode}, but the tower's preprocessor config has {'; '.join(faults)}, which "
            f"{image_mode} does not follow; needs processor, or other values under model.vision.preprocessor"
        )


def plain_settings(spec: MediaSpec | PixelFormat) -> dict[str, Any]:
    """The preprocessor config that says what `to_pixels` does, of any class that does what its config says."""
    whole = {"height": spec.height, "width": spec.width}
    sizes = {"do_resize": True, "size": whole, "do_center_crop": False, "crop_size": whole, "do_pad": False}
    scales = {"do_rescale": True, "rescale_factor": SCALE, "do_convert_rgb": True, "resample": int(spec.resample)}
    return sizes | scales | {"do_normalize": True, "image_mean": list(spec.mean), "image_std": list(spec.std)}


def write_pixel_format(directory: Path, spec: MediaSpec, image_mode: str) -> None:
    """Writes `kept_settings` beside a tower's config. Raises OSError."""
    text = json.dumps(kept_settings(spec, image_mode), indent=1)
    (directory / "preprocessor_config.json").write_text(text, encoding="utf-8")


def kept_settings(spec: MediaSpec, image_mode: str) -> dict[str, Any]:
    """The preprocessor config of a model in this image mode, of which `pixel_format` makes the same again: the tower's
    own, or where its geometry was made up and the mode does not follow it, the mode's."""
    settings: dict[str, Any] = json.loads(spec.processor)
    if image_mode != "processor" and spec.is_usual:
        try:
            refuse_unfollowed(replace(spec, is_usual=False), image_mode)
        except ConfigError:
            settings |= plain_settings(spec)
    return settings


def as_it_was(tower: TowerConfigs, image_mode: str) -> dict[str, Any] | None:
    """Settings in the place of a checkpoint's (`model.vision.preprocessor`), by which its images were prepared before
    `pad` and `resize` followed its preprocessor config; None where that is no difference."""
    if image_mode == "processor":
        return None
    usual = USUAL.get(tower.hf_config.model_type, USUAL_CLIP)
    kept: dict[str, Any] = json.loads(pixel_format(tower, {"resample": int(Image.Resampling.BICUBIC)}).processor)
    means = {"image_mean": usual.mean, "image_std": usual.std}
    then = pixel_format(tower, {key: kept.get(key, value) for key, value in means.items()} | {"resample": 3})
    with suppress(ConfigError):  # of what was passed over then
        now = pixel_format(tower)
        refuse_unfollowed(now, image_mode)
        if look_alike(now, then, image_mode):
            return None
    return {"image_processor_type": USUAL_CLIP.processor_type, **plain_settings(then)}


def look_alike(a: MediaSpec | PixelFormat, b: MediaSpec | PixelFormat, image_mode: str) -> bool:
    """Whether both make the same pixels of every image, in one image mode."""
    if image_mode == "processor":
        return a.processor == b.processor
    return all(getattr(a, name) == getattr(b, name) for name in ("height", "width", "resample", "mean", "std"))


def _unfollowed(settings: dict[str, Any], image_mode: str) -> Iterator[str]:
    """Yields what is said by keys that every class has."""
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not setting(settings, key, True):
            yield f"{key} false"
    factor = setting(settings, "rescale_factor", SCALE)
    if type(factor) not in (int, float) or abs(factor / SCALE - 1) > 1e-6:
        yield f"rescale_factor {factor!r} and not 1/255"
    size, crop = setting(settings, "size"), setting(settings, "crop_size")
    if setting(settings, "do_center_crop", False) and size is not None and crop is not None:
        edge = size.get("shortest_edge") if isinstance(size, dict) else None
        cut = height_width(crop, "crop_size")
        if min(cut) != edge if edge else cut != height_width(size, "size"):
            yield f"crop_size {crop} of size {size}"
    is_llava = str(settings.get("image_processor_type")).startswith("LlavaImageProcessor")
    if setting(settings, "do_pad", False) and not (is_llava and image_mode == "pad"):
        yield "do_pad true"


def _tried(settings: dict[str, Any], spec: MediaSpec | PixelFormat) -> Iterator[str]:
    """Yields what is said by others: its class gets an image of which both make the same, if it says nothing else.
    Raises ConfigError where the class refuses."""
    noise = np.random.default_rng(0).integers(0, 256, (2 * spec.height, 2 * spec.width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs, ours = made_by_class(settings, image), to_pixels(image, spec)
    if theirs is None:
        return
    name, seen = settings["image_processor_type"], f"{image.width} x {image.height}"
    if theirs.shape != ours.shape:
        yield f"settings by which {name} makes pixels {theirs.shape} of an image of {seen}, not {ours.shape}"
    elif (off := float(np.abs(theirs - ours).max())) > _TOLERANCE * max(1.0, float(np.abs(ours).max())):
        yield f"settings by which {name} makes other pixels of an image of {seen}, off by {off:.2g}"
