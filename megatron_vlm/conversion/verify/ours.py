"""A checkpoint of ours as one side of a comparison: the product's own model, in one process.

The images' rows go straight to their places: the exchange between ranks moves rows, and no weight has a part in it.

Hazard: megatron-core knows one arrangement of ranks per process; the world made here ends with the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.checkpoint.integrity import refuse_damage
from megatron_vlm.checkpoint.manifest import METADATA_FILE, Manifest
from megatron_vlm.checkpoint.recipe import inference_config
from megatron_vlm.checkpoint.store import load_checkpoint
from megatron_vlm.checkpoint.stored_metadata import read_metadata
from megatron_vlm.config.schema import Config, OpsConfig, ParallelConfig, PrecisionConfig
from megatron_vlm.conversion.formats.base import AskedAs
from megatron_vlm.conversion.native.reading import MODEL_PARTS
from megatron_vlm.conversion.verify.side import Facts, coarsest, round_weights
from megatron_vlm.conversion.verify.trace import HEAD, Anatomy, Probe, Trace, traced
from megatron_vlm.errors import ParallelError
from megatron_vlm.models.description import ModelDescription, describe_model
from megatron_vlm.models.families import build_model
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vision.preprocessing import PixelFormat, pixel_format
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import Grid, GridSizes, build_grid
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.distributed import Launch, init_world, teardown
from megatron_vlm.runtime.seeding import seed_everything

_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class OurSide:
    """A checkpoint. The protocol is `side.Side`."""

    origin: str
    directory: Path
    config: Config  # the recipe, in fp32 on one rank, its parts from inside the checkpoint
    model: ModelDescription
    facts: Facts
    weights: torch.dtype
    pixels: PixelFormat
    tokenizer: Path

    @property
    def asked(self) -> AskedAs:
        """The way the recipe says that it is asked."""
        return AskedAs.of(self.config.data)

    @classmethod
    def open(cls, path: str) -> "OurSide":
        """Raises CheckpointError, ConfigError."""
        directory = find_checkpoint(path)
        plain = {"precision": PrecisionConfig(params="fp32"), "ops": OpsConfig()}
        config, tower = inference_config(directory, ParallelConfig())
        config = config.model_copy(update=plain)
        model = describe_model(config.model, tower=tower)
        pixels = pixel_format(tower, config.model.vision.preprocessor)
        facts = Facts.of(model.language, tower.hf_config, config.model.vision.select_layer, pixels)
        return cls(path, directory, config, model, facts, _number_format(directory), pixels, directory / "tokenizer")

    def trace(self, probe: Probe, weights: torch.dtype) -> Trace:
        """Loads and runs. Raises CheckpointError; ParallelError where this process is part of a job already."""
        with _world() as grid:
            seed_everything(self.config.runtime.seed, grid)
            model = build_model(self.config, self.model, grid).train(False)
            load_checkpoint(self.directory, model, optimizer=None, states="model")
            for module in model.modules():
                round_weights(module, weights)
            return trace_model(model, probe)


@torch.no_grad()
def trace_model(model: VisionLanguageModel, probe: Probe) -> Trace:
    """Runs a whole model of one rank."""
    tower, (chunk,), device = model.vision.tower, model.language, current_device()
    survey = tower.survey
    anatomy = Anatomy(
        tower=list(tower.model.get_submodule(survey.layers_path).children()),
        num_selected=survey.selected,
        projector=model.vision.projector,
        decoder=list(chunk.decoder.layers),
        attention="self_attention",
        mlp="mlp",
        final_norm=chunk.decoder.final_layernorm,
    )
    trace = Trace(model.media_spec.tokens_per_image)
    ids = probe.ids(trace.tokens_per_image).to(device)
    with traced(anatomy, trace):
        rows = model.vision(probe.pixels.to(device)).flatten(0, 1)  # [n, t, h] -> [n * t, h]
        position_ids = torch.arange(ids.shape[1], device=device)[None]
        logits: Tensor = chunk(ids, position_ids, features=_placed(rows, ids, probe.placeholder))
    trace.record(HEAD, logits)
    return trace


def _placed(rows: Tensor, ids: Tensor, placeholder: int) -> LocalFeatures:
    position = torch.nonzero(ids[0] == placeholder).flatten()
    return LocalFeatures(rows=rows, position=position, row=torch.zeros_like(position))


def _number_format(directory: Path) -> torch.dtype:
    """Dtype of the weights as stored, not always the one that the recipe computes in. Raises CheckpointError."""
    manifest = Manifest.read(directory)
    refuse_damage(directory, manifest, [METADATA_FILE])
    stored = read_metadata(directory, manifest.files).state_dict_metadata
    return coarsest(
        {
            entry.properties.dtype
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(MODEL_PARTS)
        }
    )


@contextmanager
def _world() -> Iterator[Grid]:
    if torch.distributed.is_initialized():
        raise ParallelError("this process is a rank of a job already; a checkpoint is verified in a process of its own")
    init_world(Launch(), current_device(), _TIMEOUT_SECONDS)
    try:
        yield build_grid(GridSizes())
    finally:
        teardown()
