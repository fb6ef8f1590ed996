"""A small valid recipe as a tree, and the facts of its model, for the tests of config/."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.config import Config, ModelFacts, config_from_tree, load_config
from megatron_vlm.errors import ConfigError

FACTS = ModelFacts(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=192,
    vocab_size=301,
    vision_num_layers=3,
    tokens_per_image=16,
    parameter_names={
        "language": (
            "language.embedding.word_embeddings.weight",
            "language.decoder.layers.0.mlp.linear_fc1.weight",
        ),
        "vision": ("vision.encoder.layers.0.mlp.fc1.bias",),
        "projector": ("projector.0.weight", "projector.0.bias"),
    },
    families=("llava",),
    projectors=("identity", "linear", "mlp2x_gelu"),
    templates=("auto", "vicuna_v1"),
    tasks=("exact_match",),
    installed=frozenset({"psutil", "einops", "pillow", "matplotlib", "jinja2"}),
)


def tree(**changes: Any) -> dict[str, Any]:
    """A recipe for 8 layers and 8 heads; `changes` are `section__key=value`."""
    recipe: dict[str, Any] = {
        "model": {
            "language": {"config": {"model_type": "llama"}, "tokenizer": "tokenizer"},
            "vision": {"config": {"model_type": "clip_vision_model"}},
        },
        "data": {"path": "train.json"},
        "training": {"sequence_length": 128, "global_batch_size": 16, "micro_batch_size": 2, "steps": 10},
        "checkpoint": {"directory": "runs/test"},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = recipe
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return recipe


def recipe(**changes: Any) -> Config:
    """The same as a `Config`."""
    return config_from_tree(tree(**changes), "test")


def facts(**changes: Any) -> ModelFacts:
    """`FACTS` with some values replaced."""
    return replace(FACTS, **changes)


def knows(monkeypatch: pytest.MonkeyPatch, known: ModelFacts) -> None:
    """Has a recipe resolved by these facts, its model not looked at."""
    monkeypatch.setattr("megatron_vlm.training.recipe.describe_model", lambda *_, **__: "described")
    monkeypatch.setattr("megatron_vlm.training.recipe.gather_facts", lambda *_: known)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message or "override" in message
    return message
