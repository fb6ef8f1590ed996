"""The parameters that each rank holds, and how much of each, known before any rank exists.

Sizes follow from the recipe and the model's Hugging Face config: tensor ranks hold equal parts of every matrix and of
the padded vocabulary, and the norms whole; pipeline ranks hold whole layers; every rank holds the whole encoder.

Hazard: the order within a chunk is the order in which megatron-core registers the modules, because it decides where its
gradient buffers are padded and cut (`memory.py`). A test compares names, order and sizes with a real model's.

Letters: T P V tensor ranks, pipeline stages, chunks per stage.
"""

from dataclasses import dataclass

import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import parameter_table
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.freezing import trainable_names
from megatron_vlm.models.language import EMBEDDING, LanguageSpec
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.parallel.sizes import GridSizes


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as one rank holds it.

    Args:
        name: the global one.
        numel: elements on this rank.
        trains: whether it has a gradient.
        shared: a tied embedding that the first and the last stage both hold.
    """

    name: str
    numel: int
    trains: bool
    shared: bool = False


@dataclass(frozen=True)
class HeldChunk:
    """One model chunk of one stage. `layers`: numbers in the whole model."""

    virtual_stage: int
    layers: range
    first: bool  # it has the embedding
    last: bool  # it has the last norm and the head
    parameters: tuple[LocalParameter, ...]  # as registered


def language_chunks(config: Config, spec: LanguageSpec, sizes: GridSizes, stage: int) -> tuple[HeldChunk, ...]:
    """The chunks of one pipeline stage, the same on all its tensor and data-parallel ranks."""
    num_chunks = config.parallel.virtual_pipeline
    num_virtual = sizes.pipeline * num_chunks
    num_layers = spec.hf_config.num_hidden_layers // num_virtual
    chunks = []
    for number in range(num_chunks):
        virtual = number * sizes.pipeline + stage
        layers = range(virtual * num_layers, (virtual + 1) * num_layers)
        first, last = virtual == 0, virtual == num_virtual - 1
        numels = _chunk_numels(spec, layers, (first, last), sizes)
        trained = trainable_names(numels, config.model)
        tied = spec.tied and sizes.pipeline > 1
        chunks.append(
            HeldChunk(
                virtual,
                layers,
                first,
                last,
                tuple(
                    LocalParameter(name, numel, name in trained, tied and name == f"language.{EMBEDDING}")
                    for name, numel in numels.items()
                ),
            )
        )
    return tuple(chunks)


def meta_encoder(config: Config, model: ModelDescription) -> VisionEncoder:
    """Tower and projector on the meta device: sizes without weights, frozen as the recipe says."""
    with torch.device("meta"):
        encoder = VisionEncoder(model.survey, config, model.language.hidden_size, rank=0)
    names = encoder.global_names()
    unreached = {f"vision.{name}" for name in encoder.tower.survey.unreached}
    trained = trainable_names(names.values(), config.model, unreached)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(names[name] in trained)
    return encoder


def vision_parameters(encoder: VisionEncoder) -> tuple[LocalParameter, ...]:
    """The encoder's, the same on every rank."""
    names = encoder.global_names()
    return tuple(
        LocalParameter(names[name], parameter.numel(), parameter.requires_grad)
        for name, parameter in encoder.named_parameters()
    )


def _chunk_numels(spec: LanguageSpec, layers: range, ends: tuple[bool, bool], sizes: GridSizes) -> dict[str, int]:
    """Global name -> elements on a rank; `ends`: whether the chunk is the first, and the last."""
    table, (first, last) = parameter_table(spec.hf_config), ends
    held = table.before_layers() if first else []
    for number in layers:
        held += table.layer_as_registered(number)
    if last:
        held += table.after_layers()
        held += table.before_layers() if spec.tied else []  # within one chunk it is there already
    return {entry.name: entry.shard_numel(sizes.tensor) for entry in held}
