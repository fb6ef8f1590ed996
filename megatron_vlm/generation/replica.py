"""Decoding over a model replica, a step at a time: tokens in on every rank, the next tokens out on every rank.

Hidden states go from stage to stage by point-to-point messages of the pipeline group, through the chunks in the order
of the whole model: with virtual stages round and round. The last stage chooses; its first rank tells the replica, so
that all ranks stop together. Nothing here goes beyond the replica: data-parallel replicas never wait for each other.

Hazards: a step of one token cannot be cut over tensor ranks, so sequence parallelism is off meanwhile, in the modules
of megatron-core and in the configuration they share; a model in training gets all that back as it was. Messages pair up
by order alone, so no other traffic of the pipeline group may be under way.

Letters: b prompts, s tokens of this step, h hidden.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vlm.generation.token_step import TokenStep
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


class Replica:
    """Decodes one batch, step by step; every call is a collective of the replica.

    Args:
        model: `decoding`.
        cache: of this rank's layers.
        choose: logits [b, V] -> tokens [b, 1]; called on the last stage.
    """

    def __init__(self, model: VisionLanguageModel, cache: KVCache, choose: Callable[[Tensor], Tensor]) -> None:
        self.model, self.cache, self.choose = model, cache, choose
        self.token_steps = [TokenStep(chunk, cache) if TokenStep.describes(chunk) else None for chunk in model.language]

    def next_tokens(self, ids: Tensor, position_ids: Tensor, features: LocalFeatures | None) -> Tensor:
        """The token after each row, on every rank of the replica.

        Args:
            ids, position_ids: [b, s], equal on all ranks; the cache is extended by them.
            features: this rank's rows of the images among these tokens; None after the prompt.

        Returns:
            [b, 1].
        """
        grid = self.model.grid
        stage, num_stages = grid.coordinates.pipeline, grid.sizes.pipeline
        tokens = torch.empty(len(ids), 1, dtype=ids.dtype, device=ids.device)
        for chunk, token_step in zip(self.model.language, self.token_steps, strict=True):
            hidden = None
            if not chunk.pre_process:
                shape = ids.shape[1], ids.shape[0], chunk.config.hidden_size
                hidden = torch.empty(shape, dtype=chunk.config.params_dtype, device=ids.device)
                dist.recv(hidden, group=grid.pipeline, group_src=(stage - 1) % num_stages)
            if token_step is not None and features is None and ids.shape[1] == 1:
                output = token_step(ids, position_ids, hidden)
            else:
                chunk.set_input_tensor(hidden)
                features_here = features if chunk.pre_process else None
                output = chunk(ids, position_ids, features=features_here, cache=self.cache)
            if chunk.post_process:
                tokens = self.choose(output[:, -1])  # [b, 1, V] -> [b, 1]
            else:  # [s, b, h]
                dist.send(output.contiguous(), group=grid.pipeline, group_dst=(stage + 1) % num_stages)
        if grid.sizes.replica > 1:
            dist.broadcast(tokens, group=grid.replica, group_src=_speaker(grid))
        return tokens


def _speaker(grid: Grid) -> int:
    """The replica rank that tells the others: the first of the last stage."""
    return grid.sizes.replica_rank(Coordinates(pipeline=grid.sizes.pipeline - 1))
