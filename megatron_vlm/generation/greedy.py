"""Greedy decoding with the kv cache: the likeliest token, again and again, until every row has ended its turn.

Works on a replica of any tensor and pipeline size (replica.py), a training job's own model included. Images take the
road they take in training (plan, encode, exchange, merge; models/vlm.py): each rank of the replica reads and encodes
its share, and the rows end on the first stage.

Letters: b prompts, s their padded length.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_vlm.generation.prompts import PromptBatch
from megatron_vlm.generation.replica import decoding, next_tokens
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.context_attention import KVCache
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_plan import plan_media
from megatron_vlm.runtime.device import current_device


@torch.no_grad()
def decode_greedily(
    model: VisionLanguageModel, prompts: PromptBatch, stop_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt; a collective of the replica.

    Args:
        model: in any mode, which it keeps.
        prompts: the batch, equal on every rank of the replica.
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer; one that has not ended by then is cut.

    Returns:
        Token ids per row, without the one that ended it; on every rank of the replica.

    Raises:
        DataError: an image that this rank encodes cannot be read.
    """
    device = current_device()
    ids, positions = prompts.ids.to(device), prompts.position_ids.to(device)
    valid = None if prompts.valid.all() else prompts.valid.to(device)
    cache = KVCache(ids.shape[1] + max_new_tokens, valid)
    stops = torch.tensor(sorted(stop_ids), device=device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    answers: list[Tensor] = []
    with decoding(model):
        features: LocalFeatures | None = encode_images(model, prompts)
        for _ in range(max_new_tokens):
            ids = next_tokens(model, ids, positions, features, cache)  # -> [b, 1]
            answers.append(ids)
            ended |= torch.isin(ids[:, 0], stops)
            if ended.all():
                break
            positions, features = positions[:, -1:] + 1, None
    rows = torch.cat(answers, dim=1).tolist() if answers else [[] for _ in range(ids.shape[0])]
    return [_until_stop(row, stop_ids) for row in rows]


def encode_images(model: VisionLanguageModel, prompts: PromptBatch) -> LocalFeatures:
    """The batch's images as feature rows at their places, on the first stage; on other stages no rows. Each rank reads
    and encodes its share. A collective of the replica. Raises DataError as the images' readers do."""
    grid = model.grid
    items = [span.item for span in prompts.spans]
    plan = plan_media(items, SequenceLayout(prompts.ids.shape[1]), grid.sizes)
    own, route = plan.items_of(grid.replica_rank), plan.route(grid.replica_rank)
    spec = model.media_spec
    pixels = torch.empty(len(own), 3, spec.height, spec.width)
    for number, item in enumerate(own):
        pixels[number] = prompts.images[item]()
    encoded = model.encode(pixels.to(current_device()), [prompts.spans[item] for item in own])
    return model.place(model.exchange(encoded, route), route, micro_batch=0)


def _until_stop(row: list[int], stop_ids: Collection[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]
