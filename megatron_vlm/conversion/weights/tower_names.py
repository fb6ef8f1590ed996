"""Names of a tower's tensors on the disk, in memory, and here.

transformers renames the tensors of many models between the disk and memory (DINOv2's `attention.attention.key` is
`attention.k_proj` in the memory of version 5), by rules that change with its versions. They are asked for, not
repeated: the model is built on the meta device, and transformers' own rules lead from names to names. A canonical name
is the one in memory behind `vision_tower.`, without the inner `vision_model.` that some classes have.

Hazard: building a class imports its code, which takes seconds; where transformers renames nothing it is not done.
"""

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from megatron_vlm.conversion.mappings import TOWER_PREFIX, tower_name
from megatron_vlm.conversion.weights.sources import vision_rename
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.vision.survey import build_hf_tower

Name = TypeVar("Name", str, str | None)


class TowerNames:
    """The names of one tower.

    Args:
        config: of the vision model alone.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    def canonical(self, name: str) -> str:
        """Canonical form of a tensor's name on the disk, of any version, or in memory; without outer prefixes."""
        if not self.are_renamed:
            return tower_name(name)
        model, state, renamings, converters = self._model
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return tower_name(found)

    def disk(self, canonical: str) -> str:
        """The name transformers writes, and reads in every version that has the class; without a prefix."""
        name = canonical.removeprefix(TOWER_PREFIX)
        return self._disk_names.get(name, name) if self.are_renamed else name

    def canonical_of(self, rename: Callable[[str], Name]) -> Callable[[str], Name]:
        """A renaming of a larger model's tensors, with the tower's renamed too, which it leaves as they are behind
        `vision_tower.`."""

        def canonical(name: str) -> Name:
            found = rename(name)
            own = None if found is None else found.removeprefix(TOWER_PREFIX)
            return found if own is None or own == found else self.canonical(own)

        return canonical

    def rename_folder(self, names: Collection[str]) -> Callable[[str], str | None]:
        """The renaming that makes the names of a vision model's directory canonical, as `vision_rename`."""
        return self.canonical_of(vision_rename(names))

    @property
    def are_renamed(self) -> bool:
        """Whether by more than a prefix, which every reader here takes off."""
        classes: Any = MODEL_MAPPING_NAMES.get(self.config.model_type, ())
        names = (classes,) if isinstance(classes, str) else classes
        rules = [
            rule for name in (*names, self.config.model_type) for rule in get_checkpoint_conversion_mapping(name) or ()
        ]
        return any(not isinstance(rule, PrefixChange) for rule in rules)

    @cached_property
    def _model(self) -> tuple[nn.Module, dict[str, Any], list[Any], list[Any]]:
        """The model on the meta device, its state, and transformers' rules from the disk to memory."""
        with torch.device("meta"):
            model: Any = build_hf_tower(self.config)
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        return model, model.state_dict(), renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]

    @cached_property
    def _disk_names(self) -> dict[str, str]:
        """Disk names by canonical name without its prefix. Raises ConversionError where one tensor has several."""
        model, state, _, _ = self._model
        written = revert_weight_conversion(model, dict(state))
        names = {self.canonical(name).removeprefix(TOWER_PREFIX): name for name in written}
        if names.keys() != {tower_name(name).removeprefix(TOWER_PREFIX) for name in state}:
            raise ConversionError(
                f"transformers arranges the tensors of {self.config.model_type!r} differently on disk and in memory; "
                "needs a tower that has the same tensors in both"
            )
        return names
