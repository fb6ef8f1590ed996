"""Fills a model's parameters from Hugging Face weights or from a seed: this rank's shards only, one tensor at a time.

Strict in both directions: a tensor the model needs and the source lacks, one of another shape, or one left over that is
no known buffer is an error that names it. A silent mismatch would train from noise.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.mappings import (
    COMPUTED_BUFFERS,
    HEAD,
    canonical_name,
    language_mappings,
    projector_name,
    tower_name,
)
from megatron_vlm.conversion.weights.sources import (
    FolderSource,
    RandomSource,
    StateSource,
    WeightSource,
    named_seed,
)
from megatron_vlm.conversion.weights.tower_names import TowerNames
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.cuts import Mapping as Entry
from megatron_vlm.models.projectors import build_projector
from megatron_vlm.models.vision.survey import TowerSurvey, build_hf_tower

if TYPE_CHECKING:  # they bring megatron-core in, which takes seconds and which a converter does not need
    from megatron_vlm.models.language import LanguageModel
    from megatron_vlm.models.vision.encoder import VisionEncoder
    from megatron_vlm.models.vlm import VisionLanguageModel
    from megatron_vlm.parallel.groups import Grid

VISION_PARTS = ("vision_tower.", "multi_modal_projector.")  # canonical prefixes of what `VisionEncoder` holds
_NUM_SHOWN = 4  # names per error


def load_weights(model: "VisionLanguageModel", config: Config, grid: "Grid") -> None:
    """Fills language model, tower and projector as the recipe says: from `path`, or with `config` from the seed.

    The projector is always new here. Random weights depend on seed and name only, not on the layout.

    Raises:
        ConversionError: unreadable files; tensors missing, left over or of another shape, by name.
    """
    language, tower, projector = weight_sources(config, model.language[0].spec.hf_config, model.vision.tower.survey)
    fill_language(model.language, language, grid)
    fill_vision(model.vision, tower, "vision_tower.")
    fill_vision(model.vision, projector, "multi_modal_projector.")


def weight_sources(
    config: Config, language: PretrainedConfig, tower: TowerSurvey
) -> tuple[WeightSource, WeightSource, WeightSource]:
    """Sources of a run's first weights, by canonical name: language model, tower, projector.

    Args:
        language: the language model's Hugging Face config.
        tower: the tower's facts.

    Raises:
        ConversionError: unreadable files.
    """
    return _language_source(config, language), _tower_source(config, tower), _projector_source(config, language, tower)


def load_hf_state(model: "VisionLanguageModel", state: Mapping[str, Tensor], grid: "Grid") -> None:
    """Fills the whole model from a LlavaForConditionalGeneration state dict, with disk or memory names, old or new.

    Raises:
        ConversionError: tensors missing, left over or of another shape, by name.
    """
    parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    rename = TowerNames(model.vision.tower.survey.hf_config).canonical_of(canonical_name)
    for name, tensor in state.items():
        canonical = rename(name)
        parts[canonical.startswith(VISION_PARTS)][canonical] = tensor
    fill_language(model.language, StateSource("state dict", parts[False], str), grid)
    fill_vision(model.vision, StateSource("state dict", parts[True], str))


def _language_source(config: Config, hf_config: PretrainedConfig) -> WeightSource:
    path = config.model.language.path
    if path is not None:
        return FolderSource(path, lambda names: canonical_name)
    return RandomSource(language_mappings(hf_config), config.runtime.seed, hf_config.initializer_range)


def _tower_source(config: Config, survey: TowerSurvey) -> WeightSource:
    path = config.model.vision.path
    if path is not None:
        return FolderSource(path, TowerNames(survey.hf_config).rename_folder)
    return fresh_source(lambda: build_hf_tower(survey.hf_config), config.runtime.seed, tower_name)


def _projector_source(config: Config, language: PretrainedConfig, survey: TowerSurvey) -> WeightSource:
    widths = survey.hidden_size, language.hidden_size
    kind = config.model.projector.type
    return fresh_source(lambda: build_projector(kind, *widths), config.runtime.seed, projector_name)


def fresh_source(build: Callable[[], nn.Module], seed: int, rename: Callable[[str], str]) -> WeightSource:
    """The weights a module's own initialisation gives on the CPU under the recipe's seed, so the same on every rank."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(named_seed(seed, rename("")))
        state = build().state_dict()
    return StateSource(f"random weights of seed {seed}", state, rename)


def fill_language(chunks: "Sequence[LanguageModel]", source: WeightSource, grid: "Grid") -> None:
    """Fills this rank's shards of its chunks. Raises ConversionError as `load_weights` does."""
    spec = chunks[0].spec
    table = {entry.name: entry for entry in language_mappings(spec.hf_config)}
    spare = {HEAD} if spec.tied else set()  # a tied head is often stored all the same
    check_names(source, {name for entry in table.values() for name in entry.sources}, spare)
    for chunk in chunks:
        names = chunk.global_names()
        for local, parameter in chunk.named_parameters():
            entry = table[names[local]]
            full = [read_tensor(source, name, shape) for name, shape in zip(entry.sources, entry.shapes, strict=True)]
            _copy(entry.shard(full, grid.coordinates.tensor, grid.sizes.tensor), parameter)


def fill_vision(encoder: "VisionEncoder", source: WeightSource, prefix: str = "") -> None:
    """Fills the encoder's tensors whose canonical name has the prefix: parameters and stored buffers, whole."""
    targets = {_vision_source_name(encoder, local): t for local, t in encoder.state_dict(keep_vars=True).items()}
    targets = {name: tensor for name, tensor in targets.items() if name.startswith(prefix)}
    check_names(source, targets.keys(), set())
    for name, tensor in targets.items():
        _copy(read_tensor(source, name, tuple(tensor.shape)), tensor)


def _vision_source_name(encoder: "VisionEncoder", local: str) -> str:
    component, _, name = encoder.global_name(local).partition(".")
    return tower_name(name) if component == "vision" else projector_name(name)


def check_fit(source: WeightSource, table: Sequence[Entry]) -> list[str]:
    """Compares names and shapes with a whole model's table, before any tensor is read.

    Returns:
        The canonical names of tensors that no model here has, because it computes them.

    Raises:
        ConversionError: tensors missing, left over or of another shape, by name.
    """
    shapes = _shapes(table)
    check_names(source, shapes.keys(), set() if HEAD in shapes else {HEAD})
    for name, shape in shapes.items():
        read_tensor(source, name, shape)
    return sorted(name for name in source.names() if COMPUTED_BUFFERS.search(name) and name not in shapes)


def check_part(source: WeightSource, table: Sequence[Entry]) -> None:
    """Same as `check_fit`, for a part of the model: the source may have more. Raises ConversionError."""
    shapes = _shapes(table)
    check_names(source, shapes.keys(), set(source.names()) - shapes.keys())
    for name, shape in shapes.items():
        read_tensor(source, name, shape)


def _shapes(table: Sequence[Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of the Hugging Face tensors a table is made of."""
    return {name: shape for entry in table for name, shape in zip(entry.sources, entry.shapes, strict=True)}


def check_names(source: WeightSource, wanted: Collection[str], spare: Collection[str]) -> None:
    """Raises ConversionError for names that are missing, or left over and neither `spare` nor a known buffer."""
    given = set(source.names())
    missing = sorted(set(wanted) - given)
    left_over = sorted(name for name in given - set(wanted) - set(spare) if not COMPUTED_BUFFERS.search(name))
    complaints = [
        f"{len(names)} {what}: {', '.join(names[:_NUM_SHOWN])}{', ...' if len(names) > _NUM_SHOWN else ''}"
        for what, names in (("missing", missing), ("not in the model", left_over))
        if names
    ]
    if complaints:
        raise ConversionError(f"weights of {source.origin} do not fit the model: {'; '.join(complaints)}")


def read_tensor(source: WeightSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor. Raises ConversionError where it has another shape."""
    tensor = source.read(name)
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"{name} of {source.origin} has shape {list(tensor.shape)}, the model needs {list(shape)}"
        )
    return tensor


def _copy(value: Tensor, into: Tensor) -> None:
    assert value.shape == into.shape, f"shard {tuple(value.shape)} for a parameter {tuple(into.shape)}"
    with torch.no_grad():
        into.copy_(value)
