"""Decoding over a model replica, a step at a time: tokens in on every rank, the next tokens out on every rank.

Hidden states go from stage to stage by point-to-point messages of the pipeline group, through the chunks in the order
of the whole model: with virtual stages round and round. The last stage chooses; the rank of it that has the prompt's
last token tells the replica, so that all ranks stop together. Context ranks share the prompt; an answer's token is
every rank's. Nothing here goes beyond the replica: data-parallel replicas never wait for each other.

Hazards: a step of one token cannot be cut over tensor ranks, so sequence parallelism is off meanwhile, in the modules
of megatron-core and in the configuration they share. Attention backends made for whole rows take neither one token nor
padding on the left, so one that the recipe names is left to `auto` meanwhile, as `OpsConfig.anywhere` does for a model
that is loaded to be asked. A model in training gets all that back as it was. Messages pair up by order alone, so no
other traffic of the pipeline group may be under way.

Letters: b prompts, s tokens of this step on this rank, h hidden.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vlm.generation.token_step import TokenStep
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.parallel.context_attention import ContextAttention, KVCache
from megatron_vlm.parallel.groups import Coordinates, Grid
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.runtime.device import current_device

SEQUENCE_SWITCHES = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


@contextlib.contextmanager
def decoding(model: VisionLanguageModel) -> Iterator[None]:
    """The model in evaluation mode, without sequence parallelism and with attention's backend `auto`; afterwards every
    module is as it was."""
    meanwhile: list[tuple[object, str, object]] = []  # owner, attribute, value
    for part in model.modules():
        meanwhile += [(module, "training", False) for module in part.modules()]
    for chunk in model.language:
        meanwhile += [(owner, name, False) for owner, name in _sequence_switches(chunk)]
        meanwhile += [(module, "backend", AUTO) for module in chunk.modules() if isinstance(module, ContextAttention)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in meanwhile]
    try:
        for owner, name, value in meanwhile:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _sequence_switches(chunk: nn.Module) -> list[tuple[object, str]]:
    """(owner, attribute) of whatever makes the chunk cut its sequences. Parameters keep their marks."""
    owners = [owner for module in chunk.modules() for owner in (module, getattr(module, "config", None))]
    return [(owner, name) for owner in owners for name in SEQUENCE_SWITCHES if hasattr(owner, name)]


class Replica:
    """Decodes one batch, step by step; every call is a collective of the replica.

    Args:
        model: `decoding`, already now: token steps note what the layers are set to.
        cache: of this rank's layers.
        choose: logits [b, V] -> tokens [b, 1]; called on the last stage.
        layout: of the prompt over the context ranks.
        documents: of the whole prompts, for context ranks; None where there is one alone.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        cache: KVCache,
        choose: Callable[[Tensor], Tensor],
        layout: SequenceLayout,
        documents: tuple[Documents, ...] | None,
    ) -> None:
        self.model, self.cache, self.choose, self.documents = model, cache, choose, documents
        self.speaker = _last_owner(model.grid, layout)
        self.token_steps = [TokenStep(chunk, cache) if TokenStep.describes(chunk) else None for chunk in model.language]

    def next_tokens(self, ids: Tensor, position_ids: Tensor, features: LocalFeatures | None) -> Tensor:
        """The token after each row, on every rank of the replica.

        Args:
            ids, position_ids: [b, s], of the prompt this rank's part, after it equal on all ranks; the cache is
                extended by them.
            features: this rank's rows of the images among these tokens; None after the prompt.

        Returns:
            [b, 1].
        """
        documents = self.documents if features is not None else None

        def run(number: int, chunk: LanguageModel, hidden: Tensor | None) -> Tensor:
            token_step = self.token_steps[number]
            if token_step is not None and features is None and ids.shape[1] == 1:
                return token_step(ids, position_ids, hidden)
            chunk.set_input_tensor(hidden)
            features_here = features if chunk.pre_process else None
            return chunk(ids, position_ids, features=features_here, cache=self.cache, documents=documents)

        grid = self.model.grid
        output = through_stages(self.model, ids.shape, run)
        if output is None:
            tokens = torch.empty(len(ids), 1, dtype=ids.dtype, device=ids.device)
        else:
            tokens = self.choose(output[:, -1])  # [b, 1, V] -> [b, 1]
        if grid.sizes.replica > 1:
            dist.broadcast(tokens, group=grid.replica, group_src=self.speaker)
        return tokens


def through_stages(
    model: VisionLanguageModel, shape: tuple[int, ...], run: Callable[[int, LanguageModel, Tensor | None], Tensor]
) -> Tensor | None:
    """Runs every chunk of the replica, in the order of the whole model.

    Args:
        model: whose chunks.
        shape: (b, s) of the tokens on this rank.
        run: (number of this rank's chunk, chunk, hidden [s, b, h] of the chunk before or None) -> its output.

    Returns:
        The last chunk's output; None on the other stages.
    """
    grid, output = model.grid, None
    stage, num_stages = grid.coordinates.pipeline, grid.sizes.pipeline
    for number, chunk in enumerate(model.language):
        hidden = None
        if not chunk.pre_process:
            hidden = torch.empty(
                (shape[1], shape[0], chunk.config.hidden_size),
                dtype=chunk.config.params_dtype,
                device=current_device(),
            )
            dist.recv(hidden, group=grid.pipeline, group_src=(stage - 1) % num_stages)
        output = run(number, chunk, hidden)
        if not chunk.post_process:  # [s, b, h]
            dist.send(output.contiguous(), group=grid.pipeline, group_dst=(stage + 1) % num_stages)
            output = None
    return output


def _last_owner(grid: Grid, layout: SequenceLayout) -> int:
    """The replica rank that has the prompt's last token on the last stage: the first of its tensor ranks."""
    ring, ulysses, _ = (int(owner) for owner in layout.owners(torch.tensor([layout.length - 1])))
    return grid.sizes.replica_rank(Coordinates(ring=ring, ulysses=ulysses, pipeline=grid.sizes.pipeline - 1))
