"""Likelihood of given answers: one forward over prompt and answer, as in training (teacher forcing).

The rows take the road of training's evaluation, on a replica of any layout: context ranks share each, and the head
computes the loss of every token, so logits are never whole. Padding on the left is a document of its own.

Letters: b prompts with their answers, s their padded length.
"""

import torch
from torch import Tensor

from megatron_vlm.data.sample import IGNORE
from megatron_vlm.generation.decoding import encode_images, spread
from megatron_vlm.generation.prompts import PromptBatch, Score
from megatron_vlm.generation.replica import decoding, through_stages
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.runtime.collectives import all_reduce_
from megatron_vlm.runtime.device import current_device


@torch.no_grad()
def score(model: VisionLanguageModel, answered: PromptBatch) -> list[Score]:
    """The score of each row's labelled answer, on every rank; a collective of the replica.

    Args:
        model: in any mode, which it keeps.
        answered: the batch with labels, equal on every rank of the replica.

    Raises:
        DataError: an image that this rank encodes cannot be read.
    """
    grid, device = model.grid, current_device()
    rows, _, own = spread(answered, grid)
    assert rows.labels is not None, "nothing to score: the prompts have no answers"
    ids, positions, labels = (x[:, own].to(device) for x in (rows.ids, rows.position_ids, rows.labels))  # [b, s/cp]
    with decoding(model):
        features = encode_images(model, rows)

        def run(_: int, chunk: LanguageModel, hidden: Tensor | None) -> Tensor:
            chunk.set_input_tensor(hidden)
            features_here = features if chunk.pre_process else None
            return chunk(ids, positions, labels=labels, features=features_here, documents=rows.documents)

        losses = through_stages(model, ids.shape, run)  # [b, s/cp] on the last stage
    sums = torch.zeros(len(ids), dtype=torch.float64, device=device)
    if losses is not None and grid.coordinates.tensor == 0:  # tensor ranks have the same
        sums -= losses.double().sum(1)
    sums = all_reduce_(sums, grid.replica)
    counts = (rows.labels != IGNORE).sum(1)
    return [Score(*both) for both in zip(sums.tolist(), counts.tolist(), strict=True)]
