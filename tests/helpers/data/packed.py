"""Rows of packed documents for tests: random ones, and who sees whom, position by position."""

import random

import torch
from torch import Tensor

from megatron_vlm.parallel.layout import Documents


def random_documents(length: int, number: int, seed: int) -> Documents:
    """`number` documents of random lengths, 1 among them often, over a row."""
    starts = random.Random(seed).sample(range(1, length), number - 1)
    return Documents((0, *sorted(starts)), length)


def visible(documents: Documents, causal: bool, window: int | None) -> Tensor:
    """[L, L] bool, queries by keys: the definition of what attention may see."""
    position = torch.arange(documents.length)
    number = documents.numbers(position)
    query, key = position[:, None], position
    seen = number[:, None] == number
    if documents.padded:
        seen &= number < len(documents.starts) - 1
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= query - key < window
    return seen
