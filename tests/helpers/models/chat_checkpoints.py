"""Checkpoints of a tokenizer with a chat template, and the comparison of their tokens with a processor's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.loading import config_from_tree, config_hash
from megatron_vlm.conversion.formats import open_pair
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.data.sample import BadSample, Sample, Turn
from megatron_vlm.data.text.conversation import ConversationEncoder
from tests.helpers.models.foreign_models import Kind, projector_alone

TOKENS_PER_IMAGE = 16
WORDS = "What is 7 + 5?| a|Which colour, 红色?|two  blanks|line\nbreak|🙂|It’s |no".split("|")


def checkpoint_of(folder: Path, make: Callable[[Path], Path], num_rows: int = 500, **data: Any) -> Path:
    """A checkpoint of this tokenizer, its vocabulary large enough, and of a recipe whose data section says that."""
    make(folder / "tokenizer")
    projector_alone(folder / "phase1", Kind(dtype="fp32"))
    base = folder / "phase1_base"
    for file in (folder / "tokenizer").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    grow(base, num_rows)
    checkpoint = import_model(open_pair(str(base), str(folder / "phase1_whole_tower")), folder / "ours")
    manifest = Manifest.read(checkpoint)
    manifest.config["data"] |= {"image_mode": "pad", **data}
    files = records_of(checkpoint, [checkpoint / name for name in manifest.files])
    digest = config_hash(config_from_tree(manifest.config, "recipe"))
    replace(manifest, files=files, config_hash=digest).write(checkpoint)
    return checkpoint


def grow(base: Path, num_rows: int) -> None:
    """Gives a language model's directory more rows than the small tokenizers have tokens."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(num_rows, state[name].shape[1]) * 0.1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": num_rows, "eos_token_id": 2}))


def conversations(template: str, count: int) -> list[tuple[list[Turn], int]]:
    """Turns, and the number of their images: 0 to 3, in the first question or in later ones."""
    random, found = Random(5), []
    for number in range(count):
        num_images, system = number % 4, random.random() < 0.3
        turns = [Turn("system", "Answer in a word.")] if system and template != "plain" else []
        num_rounds = 1 if template == "plain" else random.randint(1, 3)
        shown = random.randrange(num_rounds)
        for place in range(num_rounds):
            markers = "<image>\n" * num_images if place == shown else ""
            question = " ".join(random.choices(WORDS, k=2)).strip()
            turns.append(Turn("user", f"{markers}{question}"))
            turns.append(Turn("assistant", random.choice(WORDS).strip()))
        found.append((turns, num_images))
    return found


def messages_of(turns: list[Turn], typed: bool) -> list[dict[str, Any]]:
    """As transformers' users write them; images first, then the text."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text, count = turn.text.replace("<image>\n", ""), turn.text.count("<image>")
        images = [{"type": "image", "image": Image.new("RGB", (20, 28), "red")}] * count
        content = [*images, {"type": "text", "text": text}] if typed else turn.text
        messages.append({"role": turn.role, "content": content})
    return messages


def check_tokens(processor: Any, encoder: ConversationEncoder, template: str, count: int) -> int:
    """Compares questions and whole conversations, of typed parts and of texts; returns how many were compared."""
    marker, num_checked = encoder.marker_id, 0
    for turns, num_images in conversations(template, count):
        sample = Sample("", tuple(turns), ("",) * num_images, "")
        try:
            encoded = {True: encoder.encode_prompt(sample), False: encoder.encode(sample)}
        except BadSample:  # no template but `plain` and those without a system turn refuse any
            assert template == "plain" or turns[0].role == "system"
            continue
        for asks, trained in encoded.items():
            ids = list(trained.ids)
            for start in trained.image_starts:
                ids[start : start + TOKENS_PER_IMAGE] = [marker] * TOKENS_PER_IMAGE
            given = turns[:-1] if asks else turns
            options = {"tokenize": True, "return_dict": True, "add_generation_prompt": asks}
            typed = processor.apply_chat_template(messages_of(given, typed=True), **options)["input_ids"][0]
            assert list(typed) == ids, (turns, encoder.tokenizer.decode(typed), encoder.tokenizer.decode(ids))
            images = [Image.new("RGB", (20, 28), "red")] * num_images
            options["processor_kwargs"] = {"images": images} if images else {}
            texts = processor.apply_chat_template(messages_of(given, typed=False), **options)["input_ids"][0]
            assert list(texts) == ids
            num_checked += 1
    return num_checked
