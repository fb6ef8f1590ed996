"""The pixels of a run: those of its recipe, and of one that goes on those that it began with.

A tower's preprocessor config lies beside its weights, where it may change between two starts, and this package may come
to read it otherwise. Half a training with other pixels is not what was asked for, so the checkpoint's are kept.
"""

from dataclasses import replace

import torch.distributed as dist

from megatron_vlm.checkpoint.recipe import former_preprocessor
from megatron_vlm.checkpoint.resume import Start
from megatron_vlm.config.schema import Config, VisionConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.pixels import look_alike, refuse_unfollowed
from megatron_vlm.models.vision.preprocessing import PixelFormat, load_processor, pixel_format
from megatron_vlm.models.vision.survey import load_vision_config
from megatron_vlm.models.vision.tower import VisionTower
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)
ACCEPTS = {"model", "model.vision", "model.vision.preprocessor"}  # among `checkpoint.accept_changes`: the recipe counts


def settle_pixels(config: Config, start: Start | None) -> PixelFormat:
    """What pictures become in this run, found before a weight is allocated.

    Raises:
        ConfigError: `data.image_mode` does not go with the tower's preprocessor config; or a run goes on with pixels of
            another size.
    """
    pixels, mode = _read(config.model.vision), config.data.image_mode
    if start is not None and start.states == "all" and not ACCEPTS & set(config.checkpoint.accept_changes):
        former = former_preprocessor(start.directory, start.manifest, mode)
        kept = _read(VisionConfig(path=str(start.directory / "vision"), preprocessor=former))
        if (kept.height, kept.width) != (pixels.height, pixels.width):
            raise ConfigError(
                f"model.vision: the tower takes {pixels.height} x {pixels.width} pixels by its preprocessor config; "
                f"{start.directory} was trained with {kept.height} x {kept.width}"
            )
        if not look_alike(pixels, kept, mode):
            if dist.get_rank() == 0:
                logger.warning(
                    "the tower's preprocessor config makes other pixels than those that %s was trained with: going on "
                    "with the checkpoint's (checkpoint.accept_changes=[model.vision.preprocessor] takes the tower's)",
                    start.directory,
                )
            pixels = kept
    refuse_unfollowed(pixels, mode)
    if mode == "processor":
        load_processor(pixels)
    return pixels


def take_pixels(tower: VisionTower, pixels: PixelFormat) -> None:
    """Has the tower's media spec say so."""
    survey = tower.survey
    tower.survey = replace(survey, media_spec=replace(survey.media_spec, **vars(pixels)))


def _read(vision: VisionConfig) -> PixelFormat:
    return pixel_format(vision.path, load_vision_config(vision), vision.preprocessor)
