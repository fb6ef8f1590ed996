"""The recipe in a checkpoint, for what uses its weights and trains nothing."""

from pathlib import Path

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config import config_from_tree
from megatron_vlm.config.schema import Config, LanguageConfig, ParallelConfig, TrainableConfig
from megatron_vlm.errors import CheckpointError


def inference_config(directory: Path, parallel: ParallelConfig) -> Config:
    """The recipe a checkpoint was trained by, made self-contained: models and tokenizer from inside the checkpoint,
    nothing trains, the layout is the given one, and every operation's backend is chosen anew.

    Raises CheckpointError where a part is missing, ConfigError where the recipe is not one this version reads.
    """
    for part in ("tokenizer", "language", "vision"):
        if not (directory / part).is_dir():
            raise CheckpointError(f"{directory} is incomplete: it has no directory {part!r}; save it again")
    config = without_training(config_from_tree(Manifest.read(directory).config, f"{directory}/manifest.json"))
    language = LanguageConfig(path=str(directory / "language"), tokenizer=str(directory / "tokenizer"))
    vision = config.model.vision.model_copy(update={"path": str(directory / "vision"), "config": None})
    model = config.model.model_copy(update={"language": language, "vision": vision})
    return config.model_copy(update={"model": model, "parallel": parallel, "ops": config.ops.anywhere()})


def without_training(config: Config) -> Config:
    """The recipe with all its parameters frozen: neither gradients nor optimizer states are kept for any. FP8 is for
    training, so what it would need is not needed."""
    frozen = TrainableConfig(language=False, vision=False, projector=False)
    model = config.model.model_copy(update={"train": frozen})
    return config.model_copy(update={"model": model, "precision": config.precision.model_copy(update={"fp8": None})})
