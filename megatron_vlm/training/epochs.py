"""`training.epochs` becomes `training.steps`, once the training data is counted.

Schedule, warm-up, hooks and checkpoints know steps alone, and recipe.yaml and the manifests hold them, as they hold
commits in the place of branches. An epoch of a mixture is each source as often as its weight says, a part of a cycle
(`plan/mixture.py`). A run that goes on counts its data again, and is compared by the steps it comes to.

Hazard: ranks that come to different numbers would wait for each other for ever. Each opens the index, where it waits
for the rank of its machine that builds it, and all take rank 0's number.
"""

from fractions import Fraction

import torch.distributed as dist

from megatron_vlm.config.schema import Config
from megatron_vlm.data.fetch.loader import TrainingData, open_training_data
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.runtime.collectives import broadcast_object
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.position import HERE

logger = get_logger(__name__)


def resolve_epochs(
    config: Config, tokenizer: Tokenizer, model: ModelDescription, world: dist.ProcessGroup
) -> tuple[Config, TrainingData | None]:
    """Puts `training.steps` in the place of `training.epochs`; a collective call.

    Args:
        config: a valid recipe. One that only evaluates stays as it is, its training data not counted.
        tokenizer: knows the image marker.
        model: the recipe's.
        world: all ranks of the job.

    Returns:
        The recipe, and its training data where they were opened to be counted.

    Raises:
        ConfigError: so many epochs have not one whole global batch.
        DataError: the data cannot be used, as `open_training_data` raises it.
    """
    epochs, training = config.training.epochs, config.training
    if epochs is None or training.mode == "eval":
        return config, None
    HERE.phase("index")
    data = open_training_data(config, tokenizer, model, world.rank())
    num_rows, num_epochs = broadcast_object((data.plan.num_rows, data.num_epochs), world)
    HERE.phase("build")
    steps = count_steps(epochs, Fraction(num_rows, num_epochs), training.global_batch_size)
    rows = f"{num_rows / num_epochs:,.10g} {'packed rows' if config.data.packing == 'rows' else 'samples'}"
    name = config.data.path or config.data.mixture
    if not steps:
        raise ConfigError(
            f"training.epochs: found {epochs:g}, which is no step: an epoch of {name} has {rows}, and a "
            f"step takes training.global_batch_size {training.global_batch_size}; needs more epochs, more data or a "
            "smaller batch"
        )
    if world.rank() == 0:
        logger.info(
            "training.epochs %g is taken as training.steps %d: whole global batches of %d in so many passes over %s",
            epochs, steps, training.global_batch_size, rows,
        )  # fmt: skip
    training = training.model_copy(update={"steps": steps, "epochs": None})
    return config.model_copy(update={"training": training}), data


def count_steps(epochs: float, num_rows: Fraction | int, global_batch_size: int) -> int:
    """Whole global batches in so many passes over the rows of an epoch, of a mixture not always a whole number;
    `epochs` as it is written, 0.1 a tenth."""
    return int(Fraction(repr(epochs)) * num_rows // global_batch_size)
