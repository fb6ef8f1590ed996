"""A one-rank grid in the test's own process, for unit tests of what needs megatron-core's groups but no second rank."""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_vlm.config.schema import Config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.15,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def small_recipe(
    language: dict[str, Any] | None = None, sections: dict[str, Any] | None = None, **parallel: Any
) -> Config:
    """A recipe of a small model with seeded weights; `language` changes LLAMA, `sections` whole sections."""
    sections = sections or {}
    return Config.model_validate(
        {
            "model": {"language": {"config": {**LLAMA, **(language or {})}}, "vision": {"config": CLIP}},
            "parallel": parallel,
            "precision": {"params": "fp32"},
            "data": {"path": "unused.json"},
            "training": {"steps": 1, "sequence_length": 64},
            "checkpoint": {"directory": "unused"},
            "ops": {"loss_chunk_tokens": 5},
            **sections,
        }
    )


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    """The grid of this process alone; groups and megatron-core's state are gone afterwards."""
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.distributed import Launch, init_world, teardown
    from megatron_vlm.runtime.seeding import seed_everything

    device = prepare("cpu")
    init_world(Launch(rank=0, world_size=1, local_rank=0, local_world_size=1), device, 60)
    try:
        grid = build_grid(GridSizes())
        seed_everything(0, grid)
        yield grid
    finally:
        teardown()
