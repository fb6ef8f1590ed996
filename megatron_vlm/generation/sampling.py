"""Choice of the next token: the likeliest, or one drawn from what temperature, top-k and top-p leave.

The restrictions are those of `transformers` (temperature first, then top-k, then top-p), so that the settings people
bring along mean the same. A draw turns one uniform number into a token by the inverse of the cumulated probabilities.
The number comes from a generator of the prompt's own, seeded by (seed, number of the prompt) and kept on the CPU, so an
answer depends neither on the layout, nor on the device, nor on what else is in the batch.

Hazard: a layout changes logits by rounding, so a number that falls within rounding of the border between two tokens'
shares may give the other one: about once in a million draws in fp32.

Letters: b rows, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError

LEAST_TEMPERATURE = 1e-30  # the likeliest token's share is 1 long before


class SamplingOptions(TypedDict, total=False):
    """Sampling options of a caller, as in `Sampling`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


@dataclass(frozen=True)
class Sampling:
    """The rule by which tokens are chosen.

    Args:
        temperature: divides the logits; 0, the default, takes the likeliest token, and so does what is below
            LEAST_TEMPERATURE, where fp32 would overflow.
        top_k: only so many likeliest tokens (and those as likely as the last of them) can be drawn. Default: all.
        top_p: only the fewest likeliest tokens whose probabilities add up to it can be drawn. Default: all.
        seed: of the draws.

    Raises:
        ConfigError: a value out of its range, or a restriction where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and self.temperature >= 0.0):
            raise ConfigError(f"temperature: found {self.temperature!r}, needs a number of at least 0")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None and not (is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ConfigError(f"top_p: found {self.top_p!r}, needs a number above 0 and up to 1")
        check_integer("seed", self.seed, 0)
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.is_greedy:
                raise ConfigError(
                    f"{name}: found {value} with temperature {self.temperature:g}, where nothing is drawn; needs one "
                    "above 0"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < LEAST_TEMPERATURE


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{name}: found {value!r}, needs an integer of at least {minimum}")


class Sampler:
    """Chooses the tokens of one batch.

    Args:
        sampling: how.
        numbers: of the prompts, in row order: what tells their draws apart.
    """

    def __init__(self, sampling: Sampling, numbers: Iterable[int]) -> None:
        self.sampling = sampling
        self._generators = [_generator(sampling.seed, number) for number in numbers]

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [b, V] -> [b, 1] int64."""
        if self.sampling.is_greedy:
            return logits.argmax(-1, keepdim=True)
        assert len(self._generators) == len(logits), f"{len(self._generators)} prompts, {len(logits)} rows"
        uniform = torch.cat([torch.rand(1, generator=own, dtype=torch.float64) for own in self._generators])
        return draw(restrict(logits, self.sampling), uniform.to(logits.device))


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [b, V] -> [b, V] fp32, divided by the temperature, -inf where a token may not be drawn."""
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]  # [b, k] -> [b, 1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ascending, order = scores.sort()
        up_to = ascending.softmax(-1).cumsum(-1)  # of a token and all that are less likely
        excluded = up_to <= 1.0 - sampling.top_p
        excluded[:, -1] = False  # the likeliest always stays
        scores = scores.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    return scores


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """The token in whose share of the cumulated probabilities the row's number falls.

    Args:
        scores: [b, V], -inf where a token may not be drawn.
        uniform: [b] fp64 in [0, 1).

    Returns:
        [b, 1] int64.
    """
    up_to = scores.double().softmax(-1).cumsum(-1)
    target = uniform[:, None] * up_to[:, -1:]  # below the sum, so the token found has a share
    return torch.searchsorted(up_to, target, right=True)


def _generator(seed: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"generation:{seed}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
