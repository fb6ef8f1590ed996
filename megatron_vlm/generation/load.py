"""From a checkpoint directory to an `Assistant`, in one process or over the ranks of a job.

A checkpoint carries all it needs (weights, resolved recipe, tokenizer, model configurations), so that it can be moved
and asked anywhere. Any layout may have saved it, and any may load it.

The imports stand inside the functions: the device must be chosen before torch and megatron-core come in, and this
module is what a plain Python process meets first.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.runtime.device import DeviceRequest, prepare
from megatron_vlm.runtime.distributed import init_world, read_launch
from megatron_vlm.runtime.logging import get_logger

if TYPE_CHECKING:
    from megatron_vlm.config.schema import Config, ParallelConfig
    from megatron_vlm.generation.assistant import Assistant

COLLECTIVE_TIMEOUT_SECONDS = 600


def load(
    path: str | os.PathLike[str], device: DeviceRequest = "auto", tensor: int = 1, pipeline: int = 1
) -> "Assistant":
    """A trained model, ready to answer. Every rank of the job calls it.

    Args:
        path: a checkpoint directory, or a directory of checkpoints (its latest).
        device: auto | cpu | cuda, where this process has not chosen already.
        tensor, pipeline: ranks that share one model; the ranks of the job are so many replicas of it, and all ranks of
            a replica ask it the same at the same time.

    Raises:
        CheckpointError: no checkpoint there, or a damaged or incomplete one.
        ConfigError: the device asked for is not there, a recipe of another version, or a layout that does not divide
            the ranks, the model's heads or its layers.
        ParallelError: this process works in another layout already.
    """
    launch = read_launch()
    with _quietly():
        torch_device = prepare(device, launch.local_world_size)
        import torch

        if not torch.distributed.is_initialized():
            init_world(launch, torch_device, COLLECTIVE_TIMEOUT_SECONDS)
        return open_checkpoint(path, tensor, pipeline)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """A script that loads a model has stdout and stderr to itself: libraries warn here of fused kernels that generation
    does not need, and the package tells what would train. Warnings of our own are still logged."""
    logger = get_logger("megatron_vlm")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def open_checkpoint(path: str | os.PathLike[str], tensor: int = 1, pipeline: int = 1) -> "Assistant":
    """The assistant of a checkpoint, in a process whose device and default process group exist. Raises as `load`."""
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_vlm.checkpoint.store import find_checkpoint, load_checkpoint
    from megatron_vlm.config.schema import ParallelConfig
    from megatron_vlm.config.validation import validate_layout
    from megatron_vlm.data.conversation import TEMPLATES
    from megatron_vlm.data.tokenizer import load_tokenizer
    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.models.facts import gather_facts
    from megatron_vlm.models.families import build_model
    from megatron_vlm.parallel.groups import GridSizes, build_grid

    directory, world_size = find_checkpoint(path), torch.distributed.get_world_size()
    config = inference_config(directory, ParallelConfig(tensor=tensor, pipeline=pipeline))
    validate_layout(config, gather_facts(config, TEMPLATES.names(), tasks=()), world_size)
    _forget_grid(tensor, pipeline)
    grid = build_grid(GridSizes.from_config(config.parallel, world_size))
    model_parallel_cuda_manual_seed(config.runtime.seed)  # on GPUs first weights are drawn from its streams
    model = build_model(config, grid).train(False)
    load_checkpoint(directory, model, optimizer=None, states="model")
    return Assistant.of(model, config.data, load_tokenizer(config.model.language.tokenizer, config.data.image_token))


def _forget_grid(tensor: int, pipeline: int) -> None:
    """Makes room for the next model's grid: megatron-core knows one per process. Models loaded before keep working,
    because the next layout is the same. Raises ParallelError where it is not."""
    from megatron.core import parallel_state

    from megatron_vlm.errors import ParallelError

    if not parallel_state.model_parallel_is_initialized():
        return
    present = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if present != (tensor, pipeline) or virtual is not None:
        raise ParallelError(
            f"this process works in a layout of tensor {present[0]} x pipeline {present[1]}"
            f"{'' if virtual is None else f' x {virtual} virtual stages'} already; a checkpoint is loaded for "
            f"generation at tensor {tensor} x pipeline {pipeline} in a process of its own"
        )
    parallel_state.destroy_model_parallel()


def inference_config(directory: Path, parallel: "ParallelConfig") -> "Config":
    """The recipe a checkpoint was trained by, made self-contained: models and tokenizer from inside the checkpoint,
    nothing trains, and the layout is the given one.

    Raises CheckpointError where a part is missing, ConfigError where the recipe is not one this version reads.
    """
    from megatron_vlm.checkpoint.manifest import Manifest
    from megatron_vlm.config import config_from_tree
    from megatron_vlm.config.schema import LanguageConfig, TrainableConfig
    from megatron_vlm.errors import CheckpointError

    for part in ("tokenizer", "language", "vision"):
        if not (directory / part).is_dir():
            raise CheckpointError(f"{directory} is incomplete: it has no directory {part!r}; save it again")
    config = config_from_tree(Manifest.read(directory).config, f"{directory}/manifest.json")
    language = LanguageConfig(path=str(directory / "language"), tokenizer=str(directory / "tokenizer"))
    vision = config.model.vision.model_copy(update={"path": str(directory / "vision"), "config": None})
    frozen = TrainableConfig(language=False, vision=False, projector=False)
    model = config.model.model_copy(update={"language": language, "vision": vision, "train": frozen})
    return config.model_copy(update={"model": model, "parallel": parallel})
