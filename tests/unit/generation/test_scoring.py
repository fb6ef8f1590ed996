"""How likely given answers are: against transformers' log-probabilities, alone and in a batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vlm.data.sample import IGNORE, Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.generation.prompts import Dialogue
from tests.unit.generation.conftest import Pair

ANSWERS = ["yes", "red circle near blue square", "no", "which"]


def theirs_of(pair: Pair, prompt: list[Any], answer: str) -> tuple[float, int]:
    """transformers' log-probability of what training would train of the one answer, and its number of tokens."""
    from tests.unit.generation.questions import questions

    (question,) = questions(pair, [prompt])
    sample = replace(question.sample, turns=(*question.sample.turns, Turn("assistant", answer)))
    encoded, tokenizer = pair.ours.encoder.encode(sample), pair.ours.encoder.tokenizer
    ids, labels = torch.tensor([encoded.ids]), torch.tensor(encoded.labels)
    trained = torch.nonzero(labels != IGNORE).flatten()
    assert tokenizer.decode(labels[trained]).strip() == f"{answer}{tokenizer.eos_token}"
    images = [image() for image in question.images]
    pixels = {"pixel_values": torch.stack(images)} if images else {}
    with torch.no_grad():
        logits = pair.theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
    return float(logits.double().log_softmax(-1)[0, trained - 1, labels[trained]].sum()), len(trained)


def test_equals_transformers_alone_and_in_a_batch(pair, prompts):
    expected = [theirs_of(pair, prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    for batch_size in (1, 3):
        scores = pair.ours.score(prompts, ANSWERS, batch_size)
        assert [score.num_tokens for score in scores] == [count for _, count in expected]
        assert [score.log_probability for score in scores] == pytest.approx([sum_ for sum_, _ in expected], rel=1e-5)
    assert pair.ours.score(prompts[1], ANSWERS[1]) == pair.ours.score([prompts[1]], [ANSWERS[1]])[0]


def test_the_last_answer_alone_is_scored(pair):
    dialogue = Dialogue((("far?", "no"),), "near?")
    score = pair.ours.score(dialogue, "yes yes")
    assert score.num_tokens == pair.ours.score("near?", "yes yes").num_tokens
    assert score != pair.ours.score(Dialogue((("far?", "yes"),), "near?"), "yes yes"), "what was said before is read"


@pytest.mark.parametrize(
    ("prompts", "answers", "needed"),
    [("What?", ["a"], "a text"), ([["What?"], ["And?"]], ["a"], "2 texts"), ([["What?"], ["And?"]], "ab", "2 texts")],
)
def test_answers_that_do_not_fit_are_refused(pair, prompts, answers, needed):
    with pytest.raises(DataError, match=f"answers: found .*, needs {needed}"):
        pair.ours.score(prompts, answers)


def test_batch_sizes_and_images_are_checked(pair):
    with pytest.raises(ConfigError, match="batch_size: found 0"):
        pair.ours.score("What?", "a", 0)
    with pytest.raises(DataError, match="1 image marker"):
        pair.ours.score("<image>?", "a")
