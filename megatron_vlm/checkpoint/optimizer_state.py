"""The optimizer's sharded state, with a defect of megatron-core 0.16 kept away from it.

The distributed optimizer gathers each buffer with the padding between its buckets left out, then cuts parameters from
it at offsets that still count the padding: from the second bucket on, master weights and moments are saved from wrong
places, with no more than a log line (fixed upstream after 0.16: NVIDIA/Megatron-LM pull request 5077). One bucket, as
without `overlap_grad_reduce` or with a small model, hides it. Here the offsets are corrected while the state is built.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, weights: dict[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """What dist_checkpointing saves of the optimizer, or fills from a checkpoint of any layout.

    Args:
        optimizer: of all components.
        weights: the models' sharded state.
        is_loading: the state is only to be filled.
    """
    with _offsets_without_bucket_padding(optimizer):
        return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=FORMAT)


@contextmanager
def _offsets_without_bucket_padding(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Each buffer's parameter offsets, for now, as in the buffer with its buckets' padding left out."""
    members = [o for o in optimizer.chained_optimizers if isinstance(o, DistributedOptimizer)]
    buffers = [buffer for member in members for buffer in member.buffers]
    originals = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer, offsets in zip(buffers, originals, strict=True):
            paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
            before = list(accumulate(paddings, initial=0))  # padding before each bucket
            buffer.param_index_map = {
                parameter: (start - before[bucket], end - before[bucket], bucket)
                for parameter, (start, end, bucket) in offsets.items()
            }
        yield
    finally:
        for buffer, offsets in zip(buffers, originals, strict=True):
            buffer.param_index_map = offsets
