"""The recipe in a checkpoint, for what uses its weights and trains nothing.

A checkpoint may be anybody's: the extensions that it names are not imported here (`config/extensions.py`), and its
tokenizer and configs are compared with the manifest before a library reads them.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vlm.checkpoint.integrity import refuse_damage, refuse_unlisted
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config import config_from_tree
from megatron_vlm.config.schema import Config, LanguageConfig, ParallelConfig, TrainableConfig, VisionConfig
from megatron_vlm.errors import CheckpointError
from megatron_vlm.models.vision.pixels import as_it_was
from megatron_vlm.models.vision.preprocessing import TowerConfigs
from megatron_vlm.models.vision.survey import read_tower
from megatron_vlm.runtime.logging import get_logger

PARTS = ("tokenizer", "language", "vision")  # directories that libraries read


def inference_config(directory: Path, parallel: ParallelConfig) -> tuple[Config, TowerConfigs]:
    """The recipe a checkpoint was trained by, made self-contained: models and tokenizer from inside the checkpoint,
    nothing trains, the layout is the given one, and every operation's backend is chosen anew. And what the checkpoint
    says of its tower.

    Raises CheckpointError where a part is missing or damaged, ConfigError where the recipe is not one this version
    reads, or names an extension that is not imported.
    """
    for part in PARTS:
        if not (directory / part).is_dir():
            raise CheckpointError(f"{directory} is incomplete: it has no directory {part!r}; save it again")
    manifest = Manifest.read(directory)
    config = without_training(saved_config(directory, manifest))
    refuse_unlisted(directory, manifest, PARTS)
    refuse_damage(directory, manifest, [name for name in manifest.files if name.partition("/")[0] in PARTS])
    language = LanguageConfig(path=str(directory / "language"), tokenizer=str(directory / "tokenizer"))
    tower = kept_tower(directory)
    former = former_preprocessor(manifest, tower, config.data.image_mode)
    if former is not None:
        tell_former(directory, config.data.image_mode)
    places = {"path": tower.path, "config": None}
    vision = config.model.vision.model_copy(update=places | ({} if former is None else {"preprocessor": former}))
    model = config.model.model_copy(update={"language": language, "vision": vision})
    return config.model_copy(update={"model": model, "parallel": parallel, "ops": config.ops.anywhere()}), tower


def kept_tower(directory: Path) -> TowerConfigs:
    """Reads the tower's configs of a checkpoint. Raises ConfigError."""
    return read_tower(VisionConfig(path=str(directory / "vision")))


def former_preprocessor(manifest: Manifest, tower: TowerConfigs, image_mode: str) -> dict[str, Any] | None:
    """`model.vision.preprocessor` by which a checkpoint is used as it was trained, where it was saved before `pad` and
    `resize` followed the tower's preprocessor config and that is a difference.

    Of an import that has not trained the tower's config counts: its model was trained elsewhere. Raises ConfigError.

    Args:
        manifest: of the checkpoint.
        tower: as the checkpoint has it (`kept_tower`).
    """
    saved_vision = manifest.config.get("model", {}).get("vision", {})
    return None if "preprocessor" in saved_vision or not manifest.step else as_it_was(tower, image_mode)


def tell_former(directory: Path, image_mode: str) -> None:
    """Rank 0 says that a checkpoint's images are prepared by `former_preprocessor`."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        get_logger(__name__).warning(
            "%s was saved before data.image_mode %s followed the tower's preprocessor config; images are prepared as "
            "they were in its training, resized by bicubic", directory, image_mode,
        )  # fmt: skip


def saved_config(directory: Path, manifest: Manifest) -> Config:
    """The recipe as it was saved. Raises ConfigError, also for an extension that is not imported."""
    return config_from_tree(manifest.config, f"{directory}/manifest.json", is_trusted=False)


def without_training(config: Config) -> Config:
    """The recipe with all its parameters frozen: neither gradients nor optimizer states are kept for any. FP8 is for
    training, so what it would need is not needed."""
    frozen = TrainableConfig(language=False, vision=False, projector=False)
    model = config.model.model_copy(update={"train": frozen})
    return config.model_copy(update={"model": model, "precision": config.precision.model_copy(update={"fp8": None})})
