"""Which keys of a cache a sliding window shows: on one rank, and on context ranks that have a part of the keys each."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.parallel.context_attention import KVCache, SharedKVCache
from megatron_vlm.parallel.layout import SequenceLayout

LAYER, NUM_ANSWERED = 3, 7
PADDING = 2  # keys at the start of the prompt


def numbered(positions: Tensor) -> Tensor:
    """Keys [1, s, 1, 1] that are their own positions."""
    return positions.double()[None, :, None, None]


def seen(cache: KVCache, num_queries: int, window: int | None, keys: Tensor) -> tuple[list[int], int]:
    """Positions of the keys that are shown and valid, and how many are read."""
    found, values, key_valid = cache.within(LAYER, keys, keys, num_queries, window)
    assert torch.equal(found, values) and found.shape[1] > 0
    valid = torch.ones(1, found.shape[1], dtype=torch.bool) if key_valid is None else key_valid
    return [int(position) for position in found[valid]], found.shape[1]


@pytest.mark.parametrize("window", [1, 3, 8, 100, None])
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_reads_what_its_window_shows(window: int | None, padded: bool) -> None:
    valid = torch.arange(8)[None] >= PADDING
    cache = KVCache(8 + NUM_ANSWERED, valid if padded else None)
    first_valid = PADDING if padded else 0
    keys, _ = cache.extend(LAYER, *(numbered(torch.arange(8)),) * 2)
    before = [max(0, query - (window or 100) + 1) for query in range(8 + NUM_ANSWERED)]
    assert seen(cache, 8, window, keys) == (list(range(first_valid, 8)), 8)  # the first query sees the first key
    assert seen(cache, 3, window, keys)[0] == list(range(max(before[5], first_valid), 8))
    for query in range(8, 8 + NUM_ANSWERED):
        keys, _ = cache.extend(LAYER, *(numbered(torch.tensor([query])),) * 2)
        shown, num_read = seen(cache, 1, window, keys)
        assert shown == list(range(max(before[query], first_valid), query + 1))
        assert num_read <= (window or 100)


def test_values_may_have_a_width_of_their_own() -> None:
    cache = KVCache(5)
    keys, values = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 6)
    cache.extend(LAYER, keys[:, :3], values[:, :3])
    all_keys, all_values = cache.extend(LAYER, keys[:, 3:], values[:, 3:])
    assert torch.equal(all_keys, keys) and torch.equal(all_values, values)


def shared_caches(layout: SequenceLayout, valid: Tensor) -> list[SharedKVCache]:
    """One of each context rank, with the prompt's keys in it."""
    ranks, caches = layout.ring * layout.ulysses, []
    for rank in range(ranks):
        group: Any = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        own = layout.positions(rank // layout.ulysses, rank % layout.ulysses)
        capacity = len(own) - (-NUM_ANSWERED // ranks)
        caches.append(SharedKVCache(capacity, valid[:, own], group, own.tolist()))
        caches[-1].extend(LAYER, *(numbered(own),) * 2)
    return caches


@pytest.mark.parametrize("window", [1, 3, 8, 100, None])
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1), (3, 1), (2, 2)])
def test_context_ranks_have_every_key_of_the_window_once(ring: int, ulysses: int, window: int | None) -> None:
    layout = SequenceLayout(24, ring, ulysses)
    caches = shared_caches(layout, torch.arange(24)[None] >= PADDING)
    nothing = 0
    for query in range(24, 24 + NUM_ANSWERED):
        keys = [cache.extend(LAYER, *(numbered(torch.tensor([query])),) * 2)[0] for cache in caches]
        shown = [seen(cache, 1, window, own)[0] for cache, own in zip(caches, keys, strict=True)]
        assert sorted(sum(shown, [])) == list(range(max(PADDING, query - (window or 100) + 1), query + 1))
        nothing += sum(not one for one in shown)
    assert nothing > 0 or window != 1, "a token's own key is on one rank, and the others must have nothing to show"


def test_keys_taken_for_neighbours_are_found_out() -> None:
    """The deliberately wrong variant: a context rank counts its keys as one process does."""
    caches = shared_caches(SequenceLayout(24, 2), torch.ones(1, 24, dtype=torch.bool))
    keys = [cache.extend(LAYER, *(numbered(torch.tensor([24])),) * 2)[0] for cache in caches]
    wrong = [KVCache._first_within(cache, LAYER, own.shape[1], 1, 8) for cache, own in zip(caches, keys, strict=True)]
    assert wrong != [cache._first_within(LAYER, own.shape[1], 1, 8) for cache, own in zip(caches, keys, strict=True)]
