"""Sequence to heads and back over real groups: every number at its place, every gradient home, in one exchange each.

Weights stand in for attention: y = sum over ranks of weight . (what the rank holds), with another weight for each rank,
token, head and width, so that the gradient of a kv head is the sum over just those ranks that need it.
"""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.ops import reference
from megatron_vlm.parallel.ulysses import HeadSplit, to_heads, to_sequence
from tests.helpers.ranks.pool import RankFailure, RankPool

B, D, DV, TOKENS_PER_RANK = 2, 3, 2, 3
COUNTS = [(8, 8, 2), (6, 3, 4), (7, 1, 2), (8, 2, 4)]  # query heads, kv heads, ranks
MORE_COUNTS = [(28, 4, 8), (4, 4, 8), (7, 1, 8), (6, 3, 8), (8, 2, 8), (40, 8, 3)]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads_read(split: HeadSplit, rank: int) -> tuple[list[int], list[int], list[int]]:
    """The heads of q, k and v that a rank must hold, counted out from the definition of grouped queries."""
    queries = [head for head in range(split.heads) if head in split.query_heads(rank)]
    keys = sorted({head // (split.heads // split.kv_heads) for head in queries})
    return queries, keys, keys


def group_of_replica(num_ranks: int, replicas: int) -> dist.ProcessGroup:
    """This rank's group of num_ranks / replicas consecutive ranks."""
    size = num_ranks // replicas
    groups = [dist.new_group(list(range(size * i, size * (i + 1)))) for i in range(replicas)]
    return groups[dist.get_rank() // size]


def nearest_kv_head(self: HeadSplit, rank: int) -> range:
    """A wrong split: the right number of kv heads, but from floor(rank * kv_heads / ranks) on."""
    start = min(rank * self.kv_heads // self.ranks, self.kv_heads - 1)
    queries = self.query_heads(rank)
    group = self.heads // self.kv_heads
    count = queries[-1] // group - queries[0] // group + 1 if queries else 0
    return range(start, start + count)


def there_and_back(counts: tuple[int, int, int], replicas: int, fault: bool, dtype: torch.dtype) -> None:
    """Checks, on one rank, what arrives, what returns, and both gradients; counts the exchanges."""
    split = HeadSplit(*counts)
    group = group_of_replica(split.ranks * replicas, replicas)
    rank, length = group.rank(), split.ranks * TOKENS_PER_RANK
    mine = slice(rank * TOKENS_PER_RANK, (rank + 1) * TOKENS_PER_RANK)
    shapes = [(split.heads, D), (split.kv_heads, D), (split.kv_heads, DV)]
    wholes = [drawn(seed, B, length, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]
    weights = [[drawn(100 * r + i, B, length, *shape, dtype=dtype) for i, shape in enumerate(shapes)] for r in range(8)]
    leaves = [x[:, mine].clone().requires_grad_() for x in wholes]

    key_heads = nearest_kv_head if fault else HeadSplit.key_heads
    with (
        mock.patch.object(HeadSplit, "key_heads", key_heads),
        mock.patch("torch.distributed.all_to_all_single", wraps=dist.all_to_all_single) as exchange,
    ):
        by_heads = to_heads(*leaves, split, group)
        heads = heads_read(split, rank)
        for held, everything, read in zip(by_heads, wholes, heads, strict=True):
            assert torch.equal(held, everything[:, :, read])
        y = sum((x * w[:, :, read]).sum() for x, w, read in zip(by_heads, weights[rank], heads, strict=True))
        y.backward()
        assert exchange.call_count == 2, "one exchange forward, one backward"
        for number, leaf in enumerate(leaves):
            expected = torch.zeros(leaf.shape)  # fp32: replicas are summed before they are rounded
            for r in range(split.ranks):
                read = heads_read(split, r)[number]
                expected[:, :, read] += weights[r][number][:, mine][:, :, read]
            assert torch.equal(leaf.grad, expected.to(dtype))

        out = by_heads[0].detach().requires_grad_()
        returned = to_sequence(out, split, group)
        assert torch.equal(returned, leaves[0])
        (returned * weights[0][0][:, mine]).sum().backward()
        assert torch.equal(out.grad, weights[0][0][:, :, heads[0]])
        assert exchange.call_count == 4


def assert_attention_is_the_same(counts: tuple[int, int, int]) -> None:
    """Causal attention through both exchanges, outputs and gradients, against one process with all heads."""
    split, group = HeadSplit(*counts), dist.group.WORLD
    rank, length = group.rank(), split.ranks * TOKENS_PER_RANK
    mine = slice(rank * TOKENS_PER_RANK, (rank + 1) * TOKENS_PER_RANK)
    shapes = [(split.heads, D), (split.kv_heads, D), (split.kv_heads, DV)]
    wholes = [drawn(seed, B, length, *shape).requires_grad_() for seed, shape in enumerate(shapes)]
    dout = drawn(9, B, length, split.heads, DV)
    expected, _ = reference.attention(*wholes, causal=True, softmax_scale=0.6)
    gradients = torch.autograd.grad(expected, wholes, dout)

    leaves = [x.detach()[:, mine].clone().requires_grad_() for x in wholes]
    q, k, v = to_heads(*leaves, split, group)
    index = list(split.kv_index(rank))
    if index:
        out, _ = reference.attention(q, k[:, :, index], v[:, :, index], causal=True, softmax_scale=0.6)
    else:
        out = q[..., :DV] + k.sum() + v.sum()  # no head: empty, and connected to the exchange
    ours = to_sequence(out, split, group)
    torch.testing.assert_close(ours, expected[:, mine])
    for leaf, gradient in zip(torch.autograd.grad(ours, leaves, dout[:, mine]), gradients, strict=True):
        torch.testing.assert_close(leaf, gradient[:, mine])


@pytest.mark.parametrize("counts", COUNTS)
def test_there_and_back(ranks: RankPool, counts: tuple[int, int, int]) -> None:
    ranks.run(counts[2], there_and_back, counts, 1, False, torch.float32)


@pytest.mark.parametrize("counts", MORE_COUNTS)
def test_there_and_back_with_uneven_and_missing_heads(ranks: RankPool, counts: tuple[int, int, int]) -> None:
    ranks.run(counts[2], there_and_back, counts, 1, False, torch.float32)


def test_in_two_groups_at_once(ranks: RankPool) -> None:
    ranks.run(8, there_and_back, (7, 1, 4), 2, False, torch.float32)


def test_bf16_gradients_of_shared_kv_heads_are_summed_in_fp32(ranks: RankPool) -> None:
    ranks.run(4, there_and_back, (7, 1, 4), 1, False, torch.bfloat16)


def test_kv_heads_by_rank_alone_are_noticed(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="assert torch.equal"):
        ranks.run(4, there_and_back, (6, 3, 4), 1, True, torch.float32)


@pytest.mark.parametrize("counts", [(7, 1, 2), (28, 4, 8), (4, 4, 8)])
def test_attention_over_the_exchange_is_attention(ranks: RankPool, counts: tuple[int, int, int]) -> None:
    ranks.run(counts[2], assert_attention_is_the_same, counts)
