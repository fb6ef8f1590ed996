"""Which token comes next: transformers' restrictions exactly, the right shares, and draws that belong to a prompt.

Chi-squared tests draw 8,000 tokens with fixed seeds over at most 12 tokens that can be drawn and ask for a p-value
above 0.001; the planted fault falls below 1e-6.
"""

from typing import Any

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.generation.sampling import Sampler, Sampling, draw, restrict

NUM_PROMPTS, NUM_DRAWS = 200, 40  # draws of each
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.7},
]


def some_logits(rows: int = 1, vocabulary: int = 12) -> torch.Tensor:
    return 1.5 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(8))


def by_transformers(logits: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Scores after the warpers in the order in which `generate` applies them."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(settings["temperature"])(None, logits)
    if "top_k" in settings:
        scores = TopKLogitsWarper(settings["top_k"])(None, scores)
    if "top_p" in settings and settings["top_p"] < 1.0:
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)
    return scores


@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 1.0, "top_k": 99}, {"temperature": 1.0, "top_p": 1.0}])
@pytest.mark.parametrize("vocabulary", [12, 501])
def test_restrictions_are_transformers_own(settings, vocabulary):
    logits = some_logits(40, vocabulary)
    logits[:, 3] = logits[:, 4]  # a tie
    assert torch.equal(restrict(logits, Sampling(**settings)), by_transformers(logits, **settings))


def test_top_p_always_leaves_one_token():
    logits = torch.tensor([[0.0, 9.0, 0.0]])
    assert restrict(logits, Sampling(temperature=1.0, top_p=1e-6)).isfinite().tolist() == [[False, True, False]]


def p_value(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-squared test that the tokens were drawn by the probabilities; a token of none fails at once."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_come_by_their_shares(settings):
    logits = some_logits()
    sampler = Sampler(Sampling(**settings, seed=5), range(NUM_PROMPTS))
    tokens = torch.cat([sampler(logits.expand(NUM_PROMPTS, -1)) for _ in range(NUM_DRAWS)])
    wanted = by_transformers(logits, **settings).double().softmax(-1)[0]
    assert p_value(tokens, wanted) > 1e-3
    flatter = (by_transformers(logits, **settings) / 1.4).double().softmax(-1)[0]
    assert p_value(tokens, flatter) < 1e-6  # the wrong variant: another temperature


def test_the_first_draws_of_prompts_and_seeds_come_by_their_shares_too():
    """Draws of different generators, which must not hang together."""
    logits = some_logits()
    wanted = logits.double().softmax(-1)[0]
    prompts = Sampler(Sampling(temperature=1.0), range(8000))(logits.expand(8000, -1))
    assert p_value(prompts, wanted) > 1e-3
    seeds = [Sampler(Sampling(temperature=1.0, seed=seed), [0])(logits) for seed in range(2000)]
    assert p_value(torch.cat(seeds), wanted) > 1e-3


def test_draws_belong_to_seed_and_prompt_and_not_to_the_batch():
    logits = some_logits(4, 501)
    settings = Sampling(temperature=1.5, seed=3)

    def draws(numbers: list[int], sampling: Sampling = settings) -> list[list[int]]:
        sampler = Sampler(sampling, numbers)
        return torch.cat([sampler(logits[numbers]) for _ in range(6)], dim=1).tolist()

    together = draws([0, 1, 2, 3])
    assert draws([2]) + draws([0, 3]) == [together[2], together[0], together[3]]
    assert draws([0], Sampling(temperature=1.5, seed=4))[0] != together[0]
    same = Sampler(settings, [0, 1])
    assert len({tuple(row) for row in torch.cat([same(logits[:1].expand(2, -1)) for _ in range(6)], 1).tolist()}) == 2


def test_a_number_falls_into_its_tokens_share():
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(scores, uniform).flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_greedy_is_the_likeliest():
    logits = some_logits(5, 501)
    assert Sampler(Sampling(), ())(logits).flatten().tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-39, 1e-30, 1e-20])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = 20 * some_logits(5, 501)
    sampler = Sampler(Sampling(temperature=temperature), range(5))
    assert sampler(logits).flatten().tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "warm"}, "temperature: found 'warm', needs a number of at least 0"),
        ({"temperature": True}, "temperature: found True"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: found 2.5, needs an integer of at least 1"),
        ({"temperature": 1.0, "top_p": "0.9"}, "top_p: found '0.9', needs a number"),
        ({"seed": "1"}, "seed: found '1', needs an integer of at least 0"),
        ({"temperature": 1e-40, "top_k": 5}, "top_k: found 5 with temperature 1e-40, where nothing is drawn"),
        ({"temperature": -1.0}, "temperature: found -1.0, needs a number of at least 0"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: found 0, needs an integer of at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: found 0.0, needs a number above 0 and up to 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: found 1.1"),
        ({"temperature": 1.0, "seed": -1}, "seed: found -1"),
        ({"top_k": 5}, "top_k: found 5 with temperature 0, where nothing is drawn; needs one above 0"),
        ({"top_p": 0.5}, "top_p: found 0.5 with temperature 0"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, message):
    with pytest.raises(ConfigError) as caught:
        Sampling(**settings)
    assert message in str(caught.value)
