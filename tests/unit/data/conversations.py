"""Conversations, the encoders they are given to, and checks of what is trained of them."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vlm.data.sample import IGNORE, Sample, Turn
from megatron_vlm.data.text.conversation import PLACEHOLDER_ID, ConversationEncoder, EncodedSample
from tests.unit.data import tokenizers

TOKENS_PER_IMAGE = 3


def conversation(*texts: str, images: int = 0, system: str | None = None) -> Sample:
    """Alternating user and assistant texts."""
    turns = [Turn("system", system)] if system is not None else []
    turns += [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    return Sample("s", tuple(turns), tuple(f"{i}.png" for i in range(images)), "test.json element 0")


def trained_texts(tokenizer: PreTrainedTokenizerBase, encoded: EncodedSample) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    for before, label in pairwise([IGNORE, *encoded.labels]):
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


def messages(sample: Sample) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in sample.turns]


def expand(ids: list[int], marker: int, filler: int) -> list[int]:
    """The reference's own expansion of image markers."""
    return [new for old in ids for new in ([filler] * TOKENS_PER_IMAGE if old == marker else [old])]


TEMPLATES: dict[str, tuple[str, bool, tuple[str, str]]] = {
    "plain": ("plain", True, ("\n", "\n")),
    "vicuna_v1": ("vicuna_v1", True, ("</s>", "</s>")),
    "llama_3": ("llama_3", True, ("<|eot_id|>", "<|end_of_text|>")),
    "chatml": (tokenizers.CHATML, False, ("<|im_end|>", "<|im_end|>")),
    "question": (tokenizers.PLAIN, False, ("\n", "\n")),
    "llama2_chat": (tokenizers.LLAMA2_CHAT, False, ("</s>", "</s>")),
    "mistral": (tokenizers.MISTRAL, False, ("</s>", "</s>")),
    "phi3": (tokenizers.PHI3, False, ("<|end|>", "<|end|>")),
    "gemma": (tokenizers.GEMMA, False, ("<end_of_turn>", "<end_of_turn>")),
    "deepseek": (tokenizers.DEEPSEEK, False, ("</s>", "</s>")),
    "qwen3": (tokenizers.QWEN3, False, ("<|im_end|>", "<|im_end|>")),
}


def encoder_of(
    template: str, tokenizer: PreTrainedTokenizerBase, apart: bool = False, **arguments: Any
) -> ConversationEncoder:
    text, is_named, _ = TEMPLATES[template]
    tokenizer.chat_template = None if is_named else text
    name = text if is_named else "auto"
    return ConversationEncoder(tokenizer, name, "<image>", TOKENS_PER_IMAGE, arguments=arguments, apart=apart)


def random_conversation(draw: random.Random, rounds: int) -> Sample:
    """Texts with all that tokenizers join at their ends, images among them, empty answers too."""

    def words(most: int) -> str:
        return "".join(draw.choice((*tokenizers.GREEDY, "x", " y")) for _ in range(draw.randint(0, most)))

    texts, images = [], 0
    for number in range(rounds):
        markers = draw.randint(1 if number == 0 else 0, 2)
        images += markers
        texts += ["<image>" * markers + f"q{words(3)}", words(4)]
    return conversation(*texts, images=images, system=f"s{words(2)}" if rounds > 1 and draw.random() < 0.3 else None)


def runs_of(encoded: EncodedSample) -> list[range]:
    """Where each run of trained tokens stands."""
    edges = [
        n
        for n, pair in enumerate(pairwise([IGNORE, *encoded.labels, IGNORE]))
        if (pair[0] == IGNORE) != (pair[1] == IGNORE)
    ]
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def check(encoder: ConversationEncoder, sample: Sample, ends: tuple[str, str]) -> None:
    """By the ids alone: every answer's run begins where its prompt ends, and ends with the first end of turn."""
    whole, tokenizer = encoder.encode(sample), encoder.tokenizer
    turns = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    turns = turns[-1:] if encoder.apart else turns
    runs = runs_of(whole)
    assert len(runs) == len(turns)
    assert all(label in (IGNORE, id_) for id_, label in zip(whole.ids, whole.labels, strict=True))
    for number, run in zip(turns, runs, strict=True):
        before = sample.turns[:number]
        num_images = sum(turn.text.count("<image>") for turn in before)
        prompt = encoder.encode_prompt(replace(sample, turns=before, images=sample.images[:num_images]))
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert run.start == len(prompt.ids)
        end = ends[number == len(sample.turns) - 1]
        said = [whole.ids[n] for n in run]
        if end.startswith("<"):
            assert [n for n, id_ in enumerate(said) if id_ == tokenizer.convert_tokens_to_ids(end)] == [len(said) - 1]
        else:
            assert tokenizer.decode(said).endswith(end)
        if number == turns[0] and not encoder.beginning and encoder.template == "auto":
            text = tokenizer.apply_chat_template(
                messages(sample)[:number], tokenize=False, add_generation_prompt=True, **encoder.arguments
            )
            asked = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert prompt.ids == expand(asked, encoder.marker_id, PLACEHOLDER_ID), "generation's prompt is its own"


def check_answer(encoder: ConversationEncoder, sample: Sample) -> None:
    """What is scored is what is trained of the last answer."""
    whole, scored = encoder.encode(sample), encoder.encode_answer(sample)
    last = runs_of(whole)[-1]
    assert runs_of(scored) == [last] and scored.ids[last.start : last.stop] == whole.ids[last.start : last.stop]


def conversations(template: str, number: int, seed: int = 0) -> list[Sample]:
    draw = random.Random(f"{template} {seed}")
    return [random_conversation(draw, 1 if template == "plain" else draw.randint(1, 3)) for _ in range(number)]
