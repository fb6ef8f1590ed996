"""The pixels of a run: those of its recipe, and of one that goes on those that it began with.

A tower's preprocessor config lies beside its weights, where it may change between two starts, and this package may come
to read it otherwise. Half a training with other pixels is not what was asked for, so the checkpoint's are kept.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.recipe import former_preprocessor, kept_tower, tell_former
from megatron_vlm.checkpoint.resume import Start
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError, MegatronVlmError, one_line
from megatron_vlm.models.vision.pixels import look_alike, plain_settings, refuse_unfollowed
from megatron_vlm.models.vision.preprocessing import PixelFormat, TowerConfigs, load_processor, pixel_format
from megatron_vlm.runtime.collectives import broadcast_object
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.hub_ids import candidates

logger = get_logger(__name__)
ACCEPTS = {"model", "model.vision", "model.vision.preprocessor"}  # among `checkpoint.accept_changes`: the recipe counts
_VALUES = ("resample", "image_mean", "image_std")  # of a preprocessor config, read when a tower's facts are found


@dataclass(frozen=True)
class KeptPixels:
    """The pixels that a checkpoint was trained with. `is_former`: it was saved before they were written down."""

    checkpoint: Path
    pixels: PixelFormat
    is_former: bool

    @classmethod
    def of(cls, checkpoint: Path, manifest: Manifest, image_mode: str) -> "KeptPixels":
        """Raises ConfigError."""
        tower = kept_tower(checkpoint)
        former = former_preprocessor(manifest, tower, image_mode)
        return cls(checkpoint, pixel_format(tower, former), former is not None)


def settle_pixels(config: Config, tower: TowerConfigs, start: Start | None, foreseen: KeptPixels | None) -> PixelFormat:
    """Resolves the pixels of images in this run, before a weight is allocated.

    Args:
        tower: the recipe's.
        foreseen: by `foresee_pixels`.

    Raises:
        ConfigError: `data.image_mode` does not go with the tower's preprocessor config; or a run goes on with pixels of
            another size.
    """
    mode = config.data.image_mode
    if start is None or start.states != "all" or _takes_the_towers(config):
        pixels = pixel_format(tower, config.model.vision.preprocessor)
    else:
        if foreseen is None or foreseen.checkpoint != start.directory:
            foreseen = KeptPixels.of(start.directory, start.manifest, mode)
        if foreseen.is_former:
            tell_former(start.directory, mode)
        kept = foreseen.pixels
        pixels = pixel_format(tower, with_pixels(config, kept).model.vision.preprocessor)
        if (kept.height, kept.width) != (pixels.height, pixels.width):
            raise ConfigError(
                f"model.vision: the tower takes {pixels.height} x {pixels.width} pixels by its preprocessor config; "
                f"{start.directory} was trained with {kept.height} x {kept.width}"
            )
        pixels = _towers_or_kept(config, tower, kept, start.directory)
    refuse_unfollowed(pixels, mode)
    if mode == "processor":
        load_processor(pixels)
    return pixels


def _towers_or_kept(config: Config, tower: TowerConfigs, kept: PixelFormat, checkpoint: Path) -> PixelFormat:
    """The tower's present pixels where they are the checkpoint's; else the checkpoint's, which is told."""
    found = "makes other pixels than those that"
    try:
        pixels = pixel_format(tower, config.model.vision.preprocessor)
        if look_alike(pixels, kept, config.data.image_mode):
            return pixels
    except ConfigError as error:  # of what is not read, once the checkpoint's are taken
        found = f"cannot be followed ({one_line(error)}), unlike the pixels that"
    if dist.get_rank() == 0:
        logger.warning(
            "the tower's preprocessor config %s %s was trained with: going on with the checkpoint's "
            "(checkpoint.accept_changes=[model.vision.preprocessor] takes the tower's)", found, checkpoint,
        )  # fmt: skip
    return kept


def foresee_pixels(config: Config, resumes: bool, world: dist.ProcessGroup) -> KeptPixels | None:
    """The pixels that a run keeps if it goes on, from the newest checkpoint that can be read; None where it does not go
    on, or takes the tower's. `settle_pixels` says finally. A collective call.

    Args:
        resumes: the run may go on in `checkpoint.directory`.
    """
    foreseen: tuple[KeptPixels | None] | None = None
    if world.rank() == 0:
        foreseen = (None if _takes_the_towers(config) else _foreseen(config, resumes),)
    (kept,) = broadcast_object(foreseen, world)
    return kept


def _foreseen(config: Config, resumes: bool) -> KeptPixels | None:
    with suppress(MegatronVlmError):  # none to load; it is told where hub ids are looked up
        for checkpoint in candidates(config.checkpoint, resumes):
            with suppress(MegatronVlmError):  # damaged; it is told where the checkpoints are compared
                return KeptPixels.of(checkpoint, Manifest.read(checkpoint), config.data.image_mode)
    return None


def with_pixels(config: Config, pixels: PixelFormat | None) -> Config:
    """The recipe with these in the place of what the tower's preprocessor config says, but for its size: to find a
    tower's facts, not to be saved. None: as it is."""
    if pixels is None:
        return config
    instead = {key: value for key, value in plain_settings(pixels).items() if key in _VALUES}
    vision = config.model.vision
    vision = vision.model_copy(update={"preprocessor": {**(vision.preprocessor or {}), **instead}})
    return config.model_copy(update={"model": config.model.model_copy(update={"vision": vision})})


def _takes_the_towers(config: Config) -> bool:
    return bool(ACCEPTS & set(config.checkpoint.accept_changes))
