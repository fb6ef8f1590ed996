"""`parallel.context: N`, ranks that share a sequence, becomes Ulysses and ring ranks. Pure.

Ulysses exchanges queries, keys, values and outputs before and after attention, when nothing hides it; a ring sends keys
and values while it computes. So Ulysses stays within a node, as far as there are heads, and the ring goes beyond (as in
USP, Fang and Zhao 2024).
"""

from megatron_vlm.config.schema import ParallelConfig


def split_context(parallel: ParallelConfig, num_heads: int, ranks_per_node: int) -> tuple[ParallelConfig, str]:
    """Chooses the largest Ulysses group that stays within a node and gives its ranks equally many query heads.

    Args:
        parallel: its `context` is given, its `ulysses` and `ring` are 1, its `tensor` divides the heads.
        num_heads: query heads of the language model.
        ranks_per_node: consecutive ranks that share a machine.

    Returns:
        The same with `ulysses` and `ring` instead of `context`, and the reason in a sentence.
    """
    context, tensor = parallel.context, parallel.tensor
    assert context is not None and (parallel.ulysses, parallel.ring) == (1, 1) and num_heads % tensor == 0, parallel
    heads = num_heads // tensor
    choices = (ranks for ranks in range(context, 0, -1) if context % ranks == heads % ranks == 0)
    ulysses = next(ranks for ranks in choices if ranks == 1 or ranks_per_node % (tensor * ranks) == 0)
    per_rank = " per tensor rank" if tensor > 1 else ""
    reason = (
        f"parallel.context {context} is taken as ulysses {ulysses} x ring {context // ulysses}: {ulysses} is its "
        f"largest divisor that divides the {heads} query heads{per_rank} and keeps the group within a node of "
        f"{ranks_per_node} ranks"
    )
    return parallel.model_copy(update={"context": None, "ulysses": ulysses, "ring": context // ulysses}), reason
