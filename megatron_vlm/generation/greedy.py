"""Greedy decoding with the kv cache: the likeliest token, again and again, until every row has ended its turn.

Images take the road they take in training (encode, exchange, merge; models/vlm.py), with a plan for one rank: a
replica here is one rank, without tensor, pipeline or sequence parallelism. Data-parallel ranks decode their own prompts
and never wait for each other, so nothing here may be a collective of more than the replica.

Letters: b prompts, s their padded length, h hidden, V vocabulary.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_vlm.generation.prompts import PromptBatch
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.context_attention import KVCache
from megatron_vlm.parallel.groups import GridSizes
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_plan import plan_media
from megatron_vlm.runtime.device import current_device


@torch.no_grad()
def decode_greedily(
    model: VisionLanguageModel, prompts: PromptBatch, stop_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt.

    Args:
        model: in evaluation mode, on a replica of one rank.
        prompts: the batch.
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer; one that has not ended by then is cut.

    Returns:
        Token ids per row, without the one that ended it.
    """
    language, device = model.language[0], current_device()
    ids, positions = prompts.ids.to(device), prompts.position_ids.to(device)
    valid = None if prompts.valid.all() else prompts.valid.to(device)
    cache = KVCache(ids.shape[1] + max_new_tokens, valid)
    features: LocalFeatures | None = encode_images(model, prompts)
    stops = torch.tensor(sorted(stop_ids), device=device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    answers: list[Tensor] = []
    for _ in range(max_new_tokens):
        logits = language(ids, positions, features=features, cache=cache)  # [b, 1, V]
        ids = logits[:, -1].argmax(-1, keepdim=True)  # -> [b, 1]
        answers.append(ids)
        ended |= torch.isin(ids[:, 0], stops)
        if ended.all():
            break
        positions, features = positions[:, -1:] + 1, None
    rows = torch.cat(answers, dim=1).tolist() if answers else [[] for _ in range(ids.shape[0])]
    return [_until_stop(row, stop_ids) for row in rows]


def encode_images(model: VisionLanguageModel, prompts: PromptBatch) -> LocalFeatures:
    """The batch's images as feature rows at their places, by the training step's own functions."""
    items = [span.item for span in prompts.spans]
    route = plan_media(items, SequenceLayout(prompts.ids.shape[1]), GridSizes()).route(0)
    encoded = model.encode(prompts.pixels.to(current_device()), prompts.spans)
    return model.place(model.exchange(encoded, route), route, micro_batch=0)


def _until_stop(row: list[int], stop_ids: Collection[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]
