"""Learning rate and weight decay of every parameter group at every step, from the configuration alone.

Nothing here has state: `apply` writes the rates for a given step into the groups, so a resumed run, a run loaded from
another layout and a run whose recipe changed all have the rates the recipe says (megatron-core would take them from
the checkpoint).
"""

import math
from collections.abc import Callable
from typing import Any

from megatron_vlm.config.schema import OptimizerConfig, ScheduleConfig

COMPONENTS = ("language", "projector", "vision")
DECAYS: dict[str, Callable[[float], float]] = {  # progress after the warm-up, 0..1 -> share of the way above the floor
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}


def peak_rates(optimizer: OptimizerConfig) -> dict[str, float]:
    """The peak learning rate per component; the projector's and the tower's default to the language model's."""
    own = {"language": optimizer.lr, "projector": optimizer.lr_projector, "vision": optimizer.lr_vision}
    return {component: optimizer.lr if rate is None else rate for component, rate in own.items()}


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of update number `step` (0-based) out of `steps`.

    Linear warm-up from zero over ceil(warmup_ratio * steps) updates, then by `schedule.name` half a cosine or a
    straight line from `peak` down to `schedule.min_lr`, or `peak` throughout. With min_lr 0 these are transformers'
    `get_{cosine,linear,constant}_schedule_with_warmup`; LLaVA trains with the cosine.
    """
    warmup = math.ceil(schedule.warmup_ratio * steps)
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    floor = min(schedule.min_lr, peak)
    return floor + (peak - floor) * DECAYS[schedule.name](progress)


def apply(
    groups: list[dict[str, Any]], step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> None:
    """Writes what the recipe says into parameter groups that carry `component` and `wd_mult`: a checkpoint has brought
    its own."""
    peaks = peak_rates(optimizer)
    for group in groups:
        group["lr"] = learning_rate(step, steps, peaks[group["component"]], schedule)
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = optimizer.betas, optimizer.eps
