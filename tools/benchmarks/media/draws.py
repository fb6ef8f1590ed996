"""The draw of samples on which packing and the balance of vision work are measured: sizes only, no content.

25% text, 40% one image, 15% 2-6 images, 15% one image in 1-12 tiles, 5% a video of 8-64 frames. The sizes are those
of published models whose longest sample fits 4,096 tokens: an image as VILA-1.5 sees it (SigLIP at 384 px, patches of
14, each 2 x 2 patches one token), a tile as NVILA does (448 px, the same, and a thumbnail beside two tiles or more), a
frame of 196 px. Text is log-normal, as conversations are.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["text", "image", "images", "tiles", "video"]
SHARES: dict[Kind, float] = {"text": 0.25, "image": 0.40, "images": 0.15, "tiles": 0.15, "video": 0.05}
SEQUENCE_LENGTH = 4096
FEWEST_TEXT_TOKENS = 16


@dataclass(frozen=True)
class Media:
    """One item for the vision tower: patches it costs, tokens it becomes."""

    patches: int
    tokens: int


IMAGE = Media(27 * 27, 14 * 14)
TILE = Media(32 * 32, 16 * 16)
FRAME = Media(14 * 14, 7 * 7)


@dataclass(frozen=True)
class DrawnSample:
    """One sample's sizes. `media` are its items in order; a video's frames and an image's tiles are items each."""

    kind: Kind
    text_tokens: int
    media: tuple[Media, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the row: text and media."""
        return self.text_tokens + sum(item.tokens for item in self.media)


def draw(seed: int, num_samples: int = 64) -> list[DrawnSample]:
    """A batch of samples, each of at most `SEQUENCE_LENGTH` tokens."""
    random = np.random.default_rng(seed)
    kinds = random.choice(len(SHARES), size=num_samples, p=list(SHARES.values()))
    return [_draw_one(list(SHARES)[kind], random) for kind in kinds]


def _draw_one(kind: Kind, random: np.random.Generator) -> DrawnSample:
    media: tuple[Media, ...] = ()
    if kind == "image":
        media = (IMAGE,)
    elif kind == "images":
        media = (IMAGE,) * int(random.integers(2, 7))
    elif kind == "tiles":
        num_tiles = int(random.integers(1, 13))
        media = (TILE,) * (num_tiles + (num_tiles > 1))
    elif kind == "video":
        media = (FRAME,) * int(random.integers(8, 65))
    room = SEQUENCE_LENGTH - sum(item.tokens for item in media)
    median = 400 if kind == "text" else 150
    text_tokens = int(np.clip(random.lognormal(np.log(median), 0.8), FEWEST_TEXT_TOKENS, room))
    return DrawnSample(kind, text_tokens, media)
