"""A whole job in miniature: tokenizer, conversations with images, and a recipe of a small CLIP and a small Llama.

Everything is made from fixed seeds under a directory of the test's own, with nothing downloaded. The tokenizer does not
know the image marker and the vocabulary is just its length made odd, so the marker's id lies outside the model's
vocabulary, which no tensor size divides: both must be no trouble.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.config.schema import Config
from megatron_vlm.data.text.new_tokenizer import train_tokenizer
from megatron_vlm.data.text.tokenizer import load_tokenizer

WORDS = "the picture shows red green blue square circle near far which how many small large yes no".split()
VOCABULARY_SIZE = 331
IMAGE_SIZES = ((28, 28), (40, 28), (20, 33))  # width, height


def tiny_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer with the quickstart's chat template; returns its directory."""
    path = directory / "tokenizer"
    if not path.exists():
        train_tokenizer([" ".join(WORDS), "What is this?"], VOCABULARY_SIZE, path, extra_special=())
    return path


def tiny_dataset(directory: Path, num_samples: int = 24, name: str = "train.json") -> Path:
    """A LLaVA JSON list: text only, one image, three images, and several turns with a system turn, by turns."""
    path = directory / name
    if not path.exists():
        random = np.random.default_rng(7)
        samples = [_conversation(number, directory, random) for number in range(num_samples)]
        path.write_text(json.dumps(samples))
    return path


def _conversation(number: int, directory: Path, random: np.random.Generator) -> dict[str, Any]:
    num_images, num_rounds = ((0, 1), (1, 1), (3, 1), (1, 2))[number % 4]
    images = [_image(directory, f"images/{number}-{i}.png", random) for i in range(num_images)]
    turns = [{"from": "system", "value": "Answer in words."}] if num_rounds > 1 else []
    for round_number in range(num_rounds):
        markers = "<image>\n" * num_images if round_number == 0 else ""
        turns.append({"from": "human", "value": f"{markers}{_words(random, 3)}?"})
        turns.append({"from": "gpt", "value": _words(random, int(random.integers(1, 7)))})
    record: dict[str, Any] = {"id": f"sample-{number}", "conversations": turns}
    if images:
        record["image"] = images if num_images > 1 else images[0]
    return record


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(random.choice(WORDS, count))


def _image(directory: Path, name: str, random: np.random.Generator) -> str:
    width, height = IMAGE_SIZES[int(random.integers(len(IMAGE_SIZES)))]
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(directory / name)
    return name


def tiny_recipe(directory: Path, **sections: Any) -> Config:
    """A recipe over a tiny tokenizer and data set under `directory`, fp32 on the CPU.

    Args:
        sections: what differs, by section: `parallel={"tensor": 2}, training={"steps": 3}`; merged at any depth, but a
            `config` of a model part is taken whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(directory)
    vocabulary = len(load_tokenizer(tokenizer, "<image>")) - 1  # the marker is none of it
    recipe = {
        "runtime": {"device": "cpu", "seed": 11},
        "model": {
            "language": {"config": tiny_llama(vocabulary + 1 - vocabulary % 2), "tokenizer": str(tokenizer)},
            "vision": {"config": tiny_clip()},
            "train": {"language": True, "vision": True, "projector": True},
        },
        "data": {"path": str(tiny_dataset(directory)), "num_workers": 0, "packing": "off"},  # tests count rows
        "precision": {"params": "fp32"},
        "optimizer": {"lr": 1e-3, "distributed": False},
        "training": {"sequence_length": 128, "global_batch_size": 8, "micro_batch_size": 1, "steps": 5},
        "checkpoint": {"directory": str(directory / "checkpoints")},
        "logging": {"progress": False, "curves": False},
    }
    return Config.model_validate(merge(recipe, sections))


def tiny_llama(vocab_size: int) -> dict[str, Any]:
    """A Llama of 4 layers with grouped queries."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }


def tiny_clip() -> dict[str, Any]:
    """A CLIP tower of 3 layers; an image is 16 patches."""
    return {
        "model_type": "clip_vision_model",
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "config"
        merged[key] = merge(merged[key], value) if nested else value
    return merged
