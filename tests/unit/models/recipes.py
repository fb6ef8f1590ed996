"""Small recipes and towers for the tests of models/."""

from typing import Any

from megatron_vlm.config.schema import Config

SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "tie_word_embeddings": False,
}


NOT_ITS_KEY = {
    "dinov2": "intermediate_size",
    "dinov2_with_registers": "intermediate_size",
    "siglip2_vision_model": "image_size",
}


def small_tower(model_type: str, **keys: Any) -> dict[str, Any]:
    """A tower of 4 layers and width 32 of a model type; `keys` are added."""
    sizes = {key: value for key, value in SMALL_TOWER.items() if key != NOT_ITS_KEY.get(model_type)}
    return {"model_type": model_type, **sizes, **keys}


def small_recipe(**model: Any) -> Config:
    """A 4-layer CLIP of width 32 and a 2-layer Llama of width 64; `model` replaces keys of the model section."""
    vision = {"config": {"model_type": "clip_vision_model", **SMALL_TOWER}}
    return Config.model_validate(
        {
            "model": {"language": {"config": SMALL_LLAMA}, "vision": vision, **model},
            "data": {"path": "unused.json"},
            "precision": {"params": "fp32"},
            "training": {"steps": 1},
            "checkpoint": {"directory": "unused"},
        }
    )
