"""Decoding with the kv cache: token after token, until every row has ended its turn.

Works on a replica of any layout (replica.py), a training job's own model included. Images take the road they take in
training (plan, encode, exchange, merge; models/vlm.py): each rank of the replica reads and encodes its share, and the
rows end on the first stage, with the context ranks that have their tokens.

Letters: b prompts, s their padded length, which the layout can cut.
"""

import torch
from torch import Tensor

from megatron_vlm.generation.prompts import PromptBatch
from megatron_vlm.generation.replica import Replica, decoding
from megatron_vlm.generation.sampling import Sampler
from megatron_vlm.generation.stopping import Stopping
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel, joined
from megatron_vlm.parallel.context_attention import KVCache, SharedKVCache
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.parallel.layout import SequenceLayout, length_multiple
from megatron_vlm.parallel.media_plan import plan_media
from megatron_vlm.runtime.device import current_device


@torch.no_grad()
def decode(
    model: VisionLanguageModel, prompts: PromptBatch, sampler: Sampler, stopping: Stopping, max_new_tokens: int
) -> list[list[int]]:
    """A continuation of each prompt; a collective of the replica.

    Args:
        model: in any mode, which it keeps.
        prompts: the batch, equal on every rank of the replica.
        sampler: chooses the tokens.
        stopping: what ends an answer.
        max_new_tokens: longest answer; one that has not ended by then is cut.

    Returns:
        Token ids per row, on every rank of the replica: without the stop token that ended it, with all of the tokens
        that a stop string lies in.

    Raises:
        DataError: an image that this rank encodes cannot be read.
    """
    grid, device = model.grid, current_device()
    prompts, layout, own = spread(prompts, grid)
    ids, positions = prompts.ids[:, own].to(device), prompts.position_ids[:, own].to(device)
    last_positions = prompts.position_ids[:, -1:].to(device)
    documents = prompts.documents if grid.sizes.context > 1 else None
    cache = make_cache(prompts.valid[:, own], max_new_tokens, grid)
    answers: list[list[int]] = [[] for _ in range(ids.shape[0])]
    unfinished = set(range(ids.shape[0]))
    with decoding(model):
        replica = Replica(model, cache, sampler, layout, documents)
        features: LocalFeatures | None = encode_images(model, prompts)
        for number in range(max_new_tokens):
            ids = replica.next_tokens(ids, positions, features)  # -> [b, 1]
            tokens = ids[:, 0].tolist()
            for row in sorted(unfinished):
                answers[row].append(tokens[row])
                if stopping.has_ended(answers[row]):
                    unfinished.remove(row)
            if not unfinished:
                break
            positions, features = last_positions + number + 1, None
    return [answer[:-1] if answer and answer[-1] in stopping.ids else answer for answer in answers]


def spread(prompts: PromptBatch, grid: Grid) -> tuple[PromptBatch, SequenceLayout, Tensor]:
    """The prompts lengthened so that the context ranks can share them, their layout, and the positions of the tokens
    that this rank has [s/cp]."""
    sizes, place = grid.sizes, grid.coordinates
    prompts = prompts.lengthened(length_multiple(sizes.ring, sizes.ulysses))
    layout = SequenceLayout(prompts.ids.shape[1], sizes.ring, sizes.ulysses)
    return prompts, layout, layout.positions(place.ring, place.ulysses)


def make_cache(valid: Tensor, max_new_tokens: int, grid: Grid) -> KVCache:
    """Makes the cache of this rank's part of prompts and answers; valid [b, s/cp]: False where padding."""
    prompt_valid = None if valid.all() else valid.to(current_device())
    if grid.sizes.context == 1:
        return KVCache(valid.shape[1] + max_new_tokens, prompt_valid)
    sizes, place = grid.sizes, grid.coordinates
    most_new_tokens = -(-max_new_tokens // sizes.context)
    layout = SequenceLayout(valid.shape[1] * sizes.context, sizes.ring, sizes.ulysses)
    positions = layout.positions(place.ring, place.ulysses).tolist()
    return SharedKVCache(valid.shape[1] + most_new_tokens, prompt_valid, grid.context, positions)


def encode_images(model: VisionLanguageModel, prompts: PromptBatch) -> LocalFeatures:
    """The batch's images as feature rows at their places, on the first stage; on other stages no rows. Each rank reads
    and encodes its share. A collective of the replica.

    Args:
        prompts: of a length that the layout can cut (`spread`).

    Raises:
        DataError: as the images' readers do.
    """
    grid = model.grid
    items = [span.item for span in prompts.spans]
    layout = SequenceLayout(prompts.ids.shape[1], grid.sizes.ring, grid.sizes.ulysses)
    plan = plan_media(items, layout, grid.sizes)
    own, route = plan.items_of(grid.replica_rank), plan.route(grid.replica_rank)
    spec = model.media_spec
    pixels = torch.empty(len(own), 3, spec.height, spec.width)
    for number, item in enumerate(own):
        pixels[number] = prompts.images[item]()
    encoded = model.encode(pixels.to(current_device()), [prompts.spans[item] for item in own])
    return model.place(model.exchange(joined(encoded), route), route, micro_batch=0)
