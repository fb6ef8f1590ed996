"""`data.packing: auto` becomes `samples`, or `off` where attention cannot keep the samples of a row apart. Pure."""

from typing import Literal

from megatron_vlm.config.schema import Config

Packing = Literal["samples", "rows", "off"]


def isolation_obstacle(config: Config) -> str | None:
    """Reason why a recipe's attention cannot keep the samples of a row apart; None where it can."""
    parallel = config.parallel
    if config.ops.attention == "cudnn" and parallel.ring > 1:
        return (
            f"ops.attention cudnn with parallel.ring {parallel.ring}, where a rank's part of a sample may be a single "
            "token, which cuDNN does not take"
        )
    return None


def packing_of(config: Config) -> Packing:
    """Way in which a recipe's rows are made; its `parallel.context` is split."""
    packing = config.data.packing
    if packing != "auto":
        return packing
    return "samples" if isolation_obstacle(config) is None else "off"


def settle_packing(config: Config) -> tuple[Config, str | None]:
    """The recipe with what it takes for `auto`; and, where that is not `samples`, the reason in a sentence."""
    taken, obstacle = packing_of(config), isolation_obstacle(config)
    told = config.data.packing == "auto" and obstacle is not None
    reason = f"data.packing auto is taken as {taken}, not samples: {obstacle}" if told else None
    return config.model_copy(update={"data": config.data.model_copy(update={"packing": taken})}), reason
