"""A data set of samples of given sizes: noise for images, words drawn by number, a tokenizer of one token per word.

What a step costs depends on how many tokens there are, how many of them are images' and how many are trained, and on
nothing else. So every sample has exactly the tokens and images asked for, and of its words a given share are answers.
Everything follows from fixed seeds: the same samples on every machine, for every side of a comparison.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data.sample import Sample, Turn
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.media_spec import MediaSpec

SPECIAL = ("<unk>", "<pad>", "</s>")
TEMPLATE_WORDS = ("USER:", "ASSISTANT:", "###")
WORDS_PER_ROUND = 96  # of a question and its answer, about
COARSE_PIXELS = 8  # a side of the noise, before it is enlarged
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] + eos_token }}"
    "{% else %} USER: {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class SampleSize:
    """Tokens, images' included, and images of a sample."""

    tokens: int
    images: int


@dataclass(frozen=True)
class Shape:
    """The shape of a made data set.

    Args:
        sequence_length: of the longest row, in tokens.
        vocab_size: of the language model.
        spec: of the vision tower.
        answers: share of the words that are the assistant's.
    """

    sequence_length: int
    vocab_size: int
    spec: MediaSpec
    answers: float


def make(folder: Path, shape: Shape, sizes: Sequence[SampleSize], data: DataConfig) -> None:
    """Writes images, conversations and tokenizer, for the recipe's template and image marker.

    Args:
        sizes: of each sample.

    Raises:
        ConfigError: the images and a conversation do not fit into a sample.
    """
    folder.mkdir(parents=True)
    make_tokenizer(folder / "tokenizer", shape.vocab_size)
    tokenizer = load_tokenizer(folder / "tokenizer", data.image_token)
    encoder = ConversationEncoder.of(data, tokenizer, shape.spec.tokens_per_image)
    random = np.random.default_rng(0)
    samples = []
    for number, size in enumerate(sizes):
        turns = fill(encoder, shape, size, random)
        speakers = {"user": "human", "assistant": "gpt"}
        spoken = [{"from": speakers[turn.role], "value": turn.text} for turn in turns]
        names = [f"{number}_{image}.png" for image in range(size.images)]
        samples.append({"id": str(number), "image": names, "conversations": spoken})
        for name in names:
            coarse = Image.fromarray(random.integers(0, 256, (COARSE_PIXELS, COARSE_PIXELS, 3), dtype=np.uint8))
            coarse.resize((shape.spec.width, shape.spec.height)).save(folder / name)
    (folder / "train.json").write_text(json.dumps(samples))


def sections(folder: Path) -> dict[str, Any]:
    """The recipe's keys for the data set in `folder`, by section."""
    return {
        "data": {"path": str(folder / "train.json"), "media_root": str(folder)},
        "model": {"language": {"tokenizer": str(folder / "tokenizer")}},
    }


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """One token per word: `w0`, `w1`, ... as far as the vocabulary goes, its last id left free."""
    known = (*SPECIAL, *TEMPLATE_WORDS)
    words = [*known, *(f"w{number}" for number in range(vocab_size - len(known) - 1))]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def fill(encoder: ConversationEncoder, shape: Shape, size: SampleSize, random: np.random.Generator) -> list[Turn]:
    """A conversation of exactly so many tokens, about so many images."""
    room = size.tokens - size.images * shape.spec.tokens_per_image
    num_rounds = max(1, room // WORDS_PER_ROUND)
    least = conversation(encoder, size.images, [(1, 1)] * num_rounds, shape, random)
    spare = size.tokens - num_tokens(encoder, least, size.images)
    if spare < 0:
        raise ConfigError(
            f"training.sequence_length: found {size.tokens}, needed {size.tokens - spare} for {size.images} images "
            f"of {shape.spec.tokens_per_image} tokens and a conversation"
        )
    answered = round(shape.answers * spare)
    answers, questions = (split(number, num_rounds) for number in (answered, spare - answered))
    words = [(1 + question, 1 + answer) for question, answer in zip(questions, answers, strict=True)]
    turns = conversation(encoder, size.images, words, shape, random)
    assert num_tokens(encoder, turns, size.images) == size.tokens
    return turns


def conversation(
    encoder: ConversationEncoder,
    num_images: int,
    words: list[tuple[int, int]],
    shape: Shape,
    random: np.random.Generator,
) -> list[Turn]:
    """Turns of so many words each: (question, answer) of every round; the images stand at the beginning."""
    marker = encoder.tokenizer.convert_ids_to_tokens(encoder.marker_id)
    num_words = shape.vocab_size - len(SPECIAL) - len(TEMPLATE_WORDS) - 1
    turns: list[Turn] = []
    for question, answer in words:
        asked, said = (" ".join(f"w{n}" for n in random.integers(0, num_words, count)) for count in (question, answer))
        images = "" if turns else f"{marker}\n" * num_images
        turns += [Turn("user", images + asked), Turn("assistant", said)]
    return turns


def num_tokens(encoder: ConversationEncoder, turns: list[Turn], num_images: int) -> int:
    """Tokens of a conversation about so many images."""
    return len(encoder.encode(Sample("bench", tuple(turns), ("image",) * num_images, "bench")).ids)


def split(total: int, parts: int) -> list[int]:
    """`total` in as equal parts as can be."""
    return [total // parts + (number < total % parts) for number in range(parts)]
