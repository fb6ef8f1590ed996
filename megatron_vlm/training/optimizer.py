"""The optimizer: megatron-core's, over the language model's chunks and the vision chunk, chained flat.

The language model's states are sharded over its data-parallel ranks and the vision chunk's over the world, because the
vision encoder is replicated on every rank. A component with no trainable parameter on any rank has no optimizer: one
over nothing cannot be saved. Chained flat, because a chain inside a chain loses its gradient-norm group.

Hazard: megatron-core matches the groups of a checkpoint by (wd_mult, lr_mult, ...) only, so two groups that differ in
nothing but their rate would both get the first one's. `lr_mult` is therefore used as the component's number, which no
recipe can change; the rates themselves come from `schedule.py` at every step.
"""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_vlm.config.megatron import optimizer_config
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.groups import Grid, vision_process_groups
from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.device import use_adam
from megatron_vlm.training.adamw import AdamW
from megatron_vlm.training.schedule import COMPONENTS


def build_optimizer(
    config: Config, language: list[DistributedDataParallel], vision: DistributedDataParallel, grid: Grid
) -> ChainedOptimizer:
    """One optimizer over everything that trains.

    Args:
        config: the recipe.
        language: this rank's model chunks, wrapped.
        vision: tower and projector, wrapped, a replica on every rank.
        grid: the process groups.
    """
    use_adam(AdamW)
    settings = optimizer_config(config)
    parts: list[MegatronOptimizer] = []
    if _trains_anywhere(language, grid):
        built = get_megatron_optimizer(
            settings, language, config_overrides=_overrides(("language",)), use_gloo_process_groups=False
        )
        parts += _flat(built)
    if _trains_anywhere([vision], grid):
        parts += _flat(_vision_optimizer(settings, vision, grid))
    for part in parts:
        part.init_state_fn(part.optimizer, part.config)  # else a save before the first update would hold no moments
        for group in part.param_groups:
            group["component"] = COMPONENTS[int(group["lr_mult"]) - 1]
            group.setdefault("step", 0)
    return FiniteOnlyOptimizer(parts)


class FiniteOnlyOptimizer(ChainedOptimizer):
    """A chain that leaves an update out where a gradient is not finite: one NaN would end up in every parameter.

    megatron-core looks for that only under loss scaling, which fp32 and bf16 do without. The norm, which it computes
    for clipping, tells, and is the same on every rank.
    """

    grad_norm: float | None = None

    def get_grad_norm(self) -> float | None:
        """Norm of all parts together; remembered for `step_with_ready_grads`."""
        self.grad_norm = super().get_grad_norm()
        return self.grad_norm

    def step_with_ready_grads(self) -> bool:
        """False, and no update, where the norm is not finite."""
        if self.grad_norm is not None and not math.isfinite(self.grad_norm):
            return False
        return super().step_with_ready_grads()


def _vision_optimizer(settings: McoreOptimizerConfig, vision: DistributedDataParallel, grid: Grid) -> MegatronOptimizer:
    return get_megatron_optimizer(
        settings,
        [vision],
        config_overrides=_overrides(("projector", "vision")),
        use_gloo_process_groups=False,
        pg_collection=vision_process_groups(grid),
    )


def _flat(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _trains_anywhere(chunks: list[DistributedDataParallel], grid: Grid) -> bool:
    here = any(p.requires_grad for chunk in chunks for p in chunk.parameters())
    return any(all_gather_objects(here, grid.world))


def _overrides(components: tuple[str, ...]) -> dict[ParamKey, Any]:
    """Group keys: which component a parameter belongs to, and no decay for vectors and biases."""
    overrides: dict[ParamKey, Any] = {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name="not_decayed", fn=_is_not_decayed)): {"wd_mult": 0.0}
    }
    for component in components:
        predicate = ParamWithNamePredicate(name=component, fn=_belongs_to(component, alone=len(components) == 1))
        overrides[ParamKey(with_name_predicate=predicate)] = {"lr_mult": float(COMPONENTS.index(component) + 1)}
    return overrides


def _is_not_decayed(param: torch.nn.Parameter, name: str) -> bool:
    return param.dim() == 1 or name.endswith(".bias")


def _belongs_to(component: str, alone: bool) -> Any:
    def belongs(param: torch.nn.Parameter, name: str) -> bool:
        return alone or name.removeprefix("module.").startswith("projector.") == (component == "projector")

    return belongs
