"""Prompts made into questions and batches, and decoded greedily."""

from functools import partial
from typing import Any

from tests.unit.generation.conftest import Pair

NUM_NEW = 8


def questions(pair: Pair, prompts: list[Any]) -> list[Any]:
    """Prompts as ready questions."""
    from megatron_vlm.generation.prompts import Question, read_prompt

    read = [read_prompt(prompt, pair.ours.image_token, number) for number, prompt in enumerate(prompts)]
    prepare = pair.ours.reader.prepare
    return [Question(sample, [partial(prepare, image) for image in images]) for sample, images in read]


def batch_of(pair: Pair, prompts: list[Any]) -> Any:
    from megatron_vlm.generation.prompts import collate

    return collate(questions(pair, prompts), pair.ours.encoder, pair.ours.model.media_spec)


def decode(pair: Pair, batch: Any, stop_ids: tuple[int, ...] = (), num_new: int = NUM_NEW) -> list[list[int]]:
    """Greedily."""
    from megatron_vlm.generation import decoding
    from megatron_vlm.generation.sampling import Sampler, Sampling
    from megatron_vlm.generation.stopping import Stopping

    stopping = Stopping(pair.ours.encoder.tokenizer, stop_ids)
    return decoding.decode(pair.ours.model, batch, Sampler(Sampling(), ()), stopping, num_new)
