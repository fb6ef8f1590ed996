"""Which heads a Ulysses rank has: all query heads once, and the kv heads they read, for any counts."""

import pytest
import torch

from megatron_vlm.ops import reference
from megatron_vlm.parallel.ulysses import HeadSplit, to_heads, to_sequence, uniform_groups

COUNTS = [(8, 8), (8, 2), (7, 1), (6, 3), (28, 4), (4, 4), (40, 8), (1, 1)]  # query heads, kv heads


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize(("heads", "kv_heads"), COUNTS)
def test_every_query_head_once_with_the_kv_head_it_reads(heads, kv_heads, ranks):
    split = HeadSplit(heads, kv_heads, ranks)
    by_rank = [split.query_heads(rank) for rank in range(ranks)]
    assert [head for queries in by_rank for head in queries] == list(range(heads))
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1
    for rank, queries in enumerate(by_rank):
        keys, index = split.key_heads(rank), split.kv_index(rank)
        assert [keys[i] for i in index] == [head // (heads // kv_heads) for head in queries]
        assert set(index) == set(range(len(keys))), "a kv head that no query head of the rank reads"


def test_the_published_shapes():
    split = HeadSplit(28, 4, 8)  # Qwen2-7B over 8 ranks
    assert (split.query_heads(1), split.key_heads(1), split.kv_index(1)) == (range(4, 8), range(0, 2), (0, 0, 0, 1))
    few = HeadSplit(4, 4, 8)
    assert [len(few.query_heads(rank)) for rank in range(8)] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert few.kv_index(7) == () and len(few.key_heads(7)) == 0


def test_kv_heads_that_do_not_divide_the_query_heads_are_refused():
    with pytest.raises(AssertionError, match="3 kv heads do not divide 8"):
        HeadSplit(8, 3, 2)


@pytest.mark.parametrize(
    ("kv_index", "expected"),
    [
        ((), []),
        ((0, 0, 0, 1), [(3, 1), (1, 1)]),
        ((0, 1, 1, 2, 2, 3), [(1, 1), (4, 2), (1, 1)]),
        ((0, 0, 1, 1, 2, 2), [(6, 3)]),
        ((0, 1, 2), [(3, 3)]),
        ((1, 1, 2, 2), [(4, 2)]),
        ((0, 2), [(1, 1), (1, 1)]),  # kv head 1 is between them
    ],
)
def test_uniform_groups_are_the_longest_runs(kv_index, expected):
    runs = uniform_groups(kv_index)
    assert [(q.stop - q.start, kv.stop - kv.start) for q, kv in runs] == expected
    assert [head for q, _ in runs for head in range(q.start, q.stop)] == list(range(len(kv_index)))


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(28, 4, 8), (6, 3, 4), (7, 1, 2), (40, 8, 3)])
def test_attention_by_uniform_groups_equals_expanded_keys(heads, kv_heads, ranks):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, h, 4, generator=generator) for h in (heads, kv_heads, kv_heads))
    split = HeadSplit(heads, kv_heads, ranks)
    expected, _ = reference.attention(q, k, v, causal=True, softmax_scale=0.5)
    for rank in range(ranks):
        queries, keys = split.query_heads(rank), split.key_heads(rank)
        mine = [x[:, :, heads_.start : heads_.stop] for x, heads_ in ((q, queries), (k, keys), (v, keys))]
        out = [
            reference.attention(
                mine[0][:, :, some], mine[1][:, :, read], mine[2][:, :, read], causal=True, softmax_scale=0.5
            )[0]
            for some, read in uniform_groups(split.kv_index(rank))
        ]
        torch.testing.assert_close(torch.cat(out, dim=2), expected[:, :, queries.start : queries.stop])


def test_one_rank_exchanges_nothing():
    q, k = torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 2, 3)
    split = HeadSplit(4, 2, 1)
    assert all(ours is given for ours, given in zip(to_heads(q, k, k, split, None), (q, k, k), strict=True))
    assert to_sequence(q, split, None) is q
