"""Hints where to look first, by what differs first. A hint names the usual cause, not a proof."""

from collections.abc import Sequence

from megatron_vlm.training.layout_check.difference import Comparison, Difference

BY_PHASE = {
    "data": "the plan must depend on nothing but index, seed and step (data/plan/order.py)",
    "build": "weights must depend on nothing but seed and name (conversion/weights/loading.py)",
    "vision encode": "an image's features depend on the rank that encodes it (data/media/images.py, models/vision/)",
    "exchange": "feature rows do not arrive at their tokens (parallel/media_plan.py, parallel/media_exchange.py)",
    "language forward": "the first wrong token tells which cut it stands behind (parallel/layout.py, models/)",
    "loss": "the head, the padded vocabulary, or the sum over ranks (models/head.py, ops/cross_entropy.py)",
    "vision backward": "feature gradients must return to the ranks that encoded (parallel/media_exchange.py), and the "
    "vision chunk's be summed over all ranks (parallel/groups.py:vision_process_groups)",
    "optimizer": "same gradients but other updates: rates by component, decay, sharded states (training/optimizer.py)",
}
EVERY_GRADIENT = (
    "every gradient of the language model differs: its sum over the data-parallel ranks, or its division by the global "
    "number of trained tokens (training/step.py)"
)
NORM_GRADIENT = (
    "under sequence parallelism a norm sees a slice of the tokens, and its gradient must be summed over the tensor "
    "ranks: is the weight marked sequence_parallel? (models/specs.py)"
)
OTHER_GRADIENT = "how this tensor's gradient is summed over the ranks that share or copy it (models/, training/step.py)"


def hint_of(first: Difference, comparisons: Sequence[Comparison]) -> str:
    """The hint for a report whose first difference is `first`."""
    if first.phase != "language backward":
        return BY_PHASE[first.phase]
    gradients = [d for c in comparisons for d in c.differences if d.phase == first.phase and d.what == first.what]
    if all(not difference.holds for difference in gradients):
        return EVERY_GRADIENT
    return NORM_GRADIENT if "layernorm" in first.tensor else OTHER_GRADIENT
