"""One step of decoding over a model replica: tokens in on every rank, the likeliest next tokens out on every rank.

Hidden states go from stage to stage by point-to-point messages of the pipeline group, through the chunks in the order
of the whole model: with virtual stages round and round. The last stage picks; its first rank tells the replica, so that
all ranks stop together. Nothing here goes beyond the replica: data-parallel replicas never wait for each other.

Hazards: a step of one token cannot be cut over tensor ranks, so sequence parallelism is off meanwhile, in the modules
of megatron-core and in the configuration they share; a model in training gets all that back as it was. Messages pair up
by order alone, so no other traffic of the pipeline group may be under way.

Letters: b prompts, s tokens of this step, h hidden.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.context_attention import KVCache
from megatron_vlm.parallel.groups import Coordinates, Grid

SEQUENCE_SWITCHES = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


@contextlib.contextmanager
def decoding(model: VisionLanguageModel) -> Iterator[None]:
    """The model in evaluation mode and without sequence parallelism; afterwards every module is as it was."""
    before: list[tuple[object, str, bool]] = []
    for part in model.modules():
        before += [(module, "training", module.training) for module in part.modules()]
    for chunk in model.language:
        before += _sequence_switches(chunk)
    try:
        for owner, name, _ in before:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _sequence_switches(chunk: nn.Module) -> list[tuple[object, str, bool]]:
    """(owner, attribute, value) of whatever makes the chunk cut its sequences. Parameters keep their marks."""
    owners = [owner for module in chunk.modules() for owner in (module, getattr(module, "config", None))]
    return [
        (owner, name, getattr(owner, name)) for owner in owners for name in SEQUENCE_SWITCHES if hasattr(owner, name)
    ]


def next_tokens(
    model: VisionLanguageModel, ids: Tensor, position_ids: Tensor, features: LocalFeatures | None, cache: KVCache
) -> Tensor:
    """The likeliest token after each row, on every rank of the replica; a collective of the replica.

    Args:
        model: `decoding`.
        ids, position_ids: [b, s], equal on all ranks.
        features: this rank's rows of the images among these tokens.
        cache: of this rank's layers, extended by these tokens.

    Returns:
        [b, 1].
    """
    grid, stage = model.grid, model.grid.coordinates.pipeline
    tokens = torch.empty(len(ids), 1, dtype=ids.dtype, device=ids.device)
    for chunk in model.language:
        if not chunk.pre_process:
            hidden = torch.empty(
                ids.shape[1], ids.shape[0], chunk.config.hidden_size, dtype=chunk.config.params_dtype, device=ids.device
            )
            dist.recv(hidden, group=grid.pipeline, group_src=(stage - 1) % grid.sizes.pipeline)
            chunk.set_input_tensor(hidden)
        output = chunk(ids, position_ids, features=features if chunk.pre_process else None, cache=cache)
        if chunk.post_process:
            tokens = output[:, -1].argmax(-1, keepdim=True)  # [b, 1, V] -> [b, 1]
        else:  # [s, b, h]
            dist.send(output.contiguous(), group=grid.pipeline, group_dst=(stage + 1) % grid.sizes.pipeline)
    if grid.sizes.replica > 1:
        dist.broadcast(tokens, group=grid.replica, group_src=_speaker(grid))
    return tokens


def _speaker(grid: Grid) -> int:
    """The replica rank that tells the others: the first of the last stage."""
    return grid.sizes.replica_rank(Coordinates(pipeline=grid.sizes.pipeline - 1))
