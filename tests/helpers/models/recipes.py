"""Recipes, layouts and planted faults that the master test and its neighbours share."""

from typing import Any

from megatron_vlm.training.layout_check.shrink import MIN_EPS, RATES
from tests.helpers.models.tiny import tiny_recipe

STEPS = 5
HANGING_FAULT = "idle_rank_skips_exchange"
DIVERGENCE = "^(value|loss|gradient|gradient norm|update|copies) of .* is off by"
Recipe = dict[str, Any]


def layout(ranks: int, **sections: dict[str, Any]) -> tuple[int, dict[str, dict[str, Any]]]:
    return ranks, sections


def parallel(ranks: int, **keys: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    return layout(ranks, parallel=keys)


PROJECTOR_ONLY = {"train": {"language": False, "vision": False, "projector": True}}
TIED = {"language": {"config": {"tie_word_embeddings": True}}}
MIXED_WINDOWS = {  # the halves of a pipeline of two have layers in another order
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
}
WINDOWS = {"language": {"config": MIXED_WINDOWS}}
PHI3 = {"language": {"config": {"model_type": "phi3", "sliding_window": 7, "pad_token_id": None}}}
PACKED = {"packing": "rows"}
PADDED = {"pad_to_multiple_of": 32}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FAULTS = {
    "vision_gradient_not_over_model_ranks-tp2": ("vision_gradient_not_over_model_ranks", parallel(2, tensor=2)),
    "vision_gradient_not_over_model_ranks-pp2": ("vision_gradient_not_over_model_ranks", parallel(2, pipeline=2)),
    "vision_gradient_not_over_data": ("vision_gradient_not_over_data", parallel(2)),
    "local_token_count": ("local_token_count", parallel(2)),
    "swapped_feature_rows": ("swapped_feature_rows", parallel(2, tensor=2)),
    "norm_gradients_not_reduced": ("norm_gradients_not_reduced", parallel(2, tensor=2, sequence=True)),
    "local_positions": ("local_positions", parallel(2, ring=2)),
    "labels_shifted_after_the_cut": ("labels_shifted_after_the_cut", parallel(2, ulysses=2)),
    "ring_block_gradient_dropped": ("ring_block_gradient_dropped", parallel(2, ring=2)),
    "window_too_wide": ("window_too_wide", layout(2, parallel={"ring": 2}, model=WINDOWS)),
    "windows_of_local_layers": ("windows_of_local_layers", layout(2, parallel={"pipeline": 2}, model=WINDOWS)),
    HANGING_FAULT: (  # windows with fewer images than ranks
        HANGING_FAULT,
        layout(4, parallel={"tensor": 2, "pipeline": 2}, training={"media_window": 2}),
    ),
}


def base_recipe(directory: Any) -> Recipe:
    """Eight rows a step, a sample each, micro-batches of one, everything training, distributed optimizer, rates that
    differ.

    Adam's eps is that of `--check-layout`: with less, rounding decides over single elements whose gradient is near it
    (`docs/decisions/0009`).
    """
    recipe = tiny_recipe(directory).model_dump(mode="json")
    changes = {
        "model": {"train": {"language": True, "vision": True, "projector": True}},
        "optimizer": {**RATES, "eps": MIN_EPS, "weight_decay": 0.1, "distributed": True},
        "schedule": {"warmup_ratio": 0.0},
        "data": {"packing": "off"},
        "training": {"global_batch_size": 8, "micro_batch_size": 1, "steps": STEPS},
    }
    return merged(recipe, changes)


def merged(recipe: Recipe, changes: Recipe) -> Recipe:
    """`recipe` with nested `changes`; neither is altered."""
    result = dict(recipe)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result
