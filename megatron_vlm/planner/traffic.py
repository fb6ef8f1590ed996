"""Bytes that each rank sends in a step, by kind, from formulas; nothing runs.

A collective of N bytes over R ranks, done as a ring, has every rank send (R-1)/R N for an all-gather or a
reduce-scatter and twice that for an all-reduce. Per step and rank, with N = s*b*h*e bytes of a micro-batch's hidden
states:

    tensor    a layer's two column- and two row-parallel products: with sequence parallelism 2 all-gathers and 2
              reduce-scatters forward, the same backward and 2 all-gathers more for the weights' gradients; without it
              2 all-reduces forward and 2 backward. Full recompute: forward once more. Embedding and head: 1 each way.
    attention queries, keys, values and outputs between Ulysses ranks, and back; keys and values to the ring ranks that
              read them (`ring_plan.py`), again in the backward pass, and their gradients home in fp32. Recompute runs
              forward once more
    pipeline  hidden states forward, their gradients backward, over every border between stages that a rank has; where
              the head is the embedding, that table's gradient, summed over the first and the last stage
    data      gradients reduced; the distributed optimizer scatters them and gathers the parameters
    images  feature rows to the owners of their tokens and gradients back, as the media plan says

Mode eval goes forward only. Left out: scalars, the loss's per-token sums, the gradient norm, checkpoints.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.media_plan import MediaPlan
from megatron_vlm.parallel.ring_plan import KeyRequest, RingPlan
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.parallel.ulysses import HeadSplit
from megatron_vlm.planner.memory import ELEMENT_BYTES
from megatron_vlm.planner.parameter_shards import HeldChunk, LocalParameter


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends to others in one step."""

    features: int = 0
    feature_gradients: int = 0
    tensor: int = 0
    attention: int = 0
    pipeline: int = 0
    data_language: int = 0
    data_vision: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Flow:
    """Tokens that go through the language model in a step on one rank."""

    num_tokens: int  # of all its replica's rows, padding included
    hidden: int


def feature_rows(plan: MediaPlan) -> list[list[int]]:
    """Rows that each media rank (outer) sends to each (inner) in a window, itself included."""
    return [plan.route(rank).send_splits for rank in range(plan.num_ranks)]


def ring_share(num_ranks: int) -> float:
    """Bytes that each rank sends of those of an all-gather or reduce-scatter."""
    return (num_ranks - 1) / num_ranks


def tensor_bytes(config: Config, chunks: Sequence[HeldChunk], flow: Flow) -> int:
    """Bytes sent over the tensor ranks."""
    tensor, context = config.parallel.tensor, config.parallel.ulysses * config.parallel.ring
    whole = flow.num_tokens // context * flow.hidden * ELEMENT_BYTES[config.precision.params]
    again = config.training.recompute.language == "full"
    for_weights = 2 if config.parallel.sequence and config.model.train.language else 0
    crossings = 0  # collectives that send (T-1)/T of the hidden states
    for chunk in chunks:
        ahead = 4 * len(chunk.layers) + chunk.first + chunk.last  # an all-reduce counts twice
        back = ahead + len(chunk.layers) * (for_weights + 4 * again)
        crossings += ahead if config.training.mode == "eval" else ahead + back
    return round(crossings * ring_share(tensor) * whole)


WIDE_BYTES = 4  # of an element of a gradient on its way round the ring


def attention_bytes(
    config: Config,
    split: HeadSplit,
    width: int,
    num_layers: int,
    at: Coordinates,
    rows: Sequence[tuple[Documents, ...]],
    window: int | None = None,
) -> int:
    """Bytes sent over the context ranks, of layers with one window.

    Args:
        split: of the heads of a tensor rank.
        width: of a head.
        num_layers: of this rank.
        rows: by micro-batch, the documents of each of its rows.
        window: keys that a query sees at most; None: all before it.
    """
    parallel, element = config.parallel, ELEMENT_BYTES[config.precision.params]
    per_key = 2 * width * len(split.key_heads(at.ulysses))
    total = 0
    for documents, count in Counter(rows).items():
        layout = SequenceLayout(documents[0].length, parallel.ring, parallel.ulysses)
        there, back = _exchanged_heads(split, at.ulysses)
        tokens = len(documents) * layout.local_length * width
        keys, gradients = _travelling_keys(RingPlan(layout, documents, window=window), at.ring, parallel.ring_mode)
        forward = (there * tokens + keys * per_key) * element
        backward = (back * tokens + keys * per_key) * element + gradients * per_key * WIDE_BYTES
        passes = 1 if config.training.mode == "eval" or config.training.recompute.language == "none" else 2
        total += count * (passes * forward + (backward if config.training.mode != "eval" else 0))
    return total * num_layers


def _exchanged_heads(split: HeadSplit, rank: int) -> tuple[int, int]:
    """Heads that a Ulysses rank sends, forward and backward, each of as many tokens as a rank owns."""
    others = [other for other in range(split.ranks) if other != rank]
    queries, keys = len(split.query_heads(rank)), len(split.key_heads(rank))
    to_queries = sum(len(split.query_heads(other)) for other in others)
    to_keys = 2 * sum(len(split.key_heads(other)) for other in others)
    return to_queries + to_keys + queries * len(others), to_queries + (queries + 2 * keys) * len(others)


def _travelling_keys(plan: RingPlan, rank: int, mode: str) -> tuple[int, int]:
    """Keys that a ring rank sends, and those whose gradients it sends home."""
    ring = plan.layout.ring
    if mode == "all_gather":
        everything = (ring - 1) * len(plan.documents) * plan.layout.length // ring
        return everything, everything

    def count(requests: Sequence[KeyRequest]) -> int:
        return sum((request.stop_row - request.first_row) * request.num_keys for request in requests)

    steps = range(1, ring)
    sent = sum(count(plan.requests((rank + step) % ring, step)) for step in steps)
    return sent, sum(count(plan.requests(rank, step)) for step in steps)


def pipeline_bytes(config: Config, chunks: Sequence[HeldChunk], sizes: GridSizes, flow: Flow) -> int:
    """Bytes sent to the stages before and after, and from the first to the last."""
    if sizes.pipeline == 1:
        return 0
    backward = config.training.mode != "eval"
    cut = sizes.context * (sizes.tensor if config.parallel.sequence else 1)
    messages = flow.num_tokens // cut * flow.hidden * ELEMENT_BYTES[config.precision.params]
    borders = sum((not chunk.last) + (backward and not chunk.first) for chunk in chunks)
    shared = sum(one.numel for chunk in chunks for one in chunk.parameters if one.shared and one.trains)
    summed = round(2 * ring_share(2) * shared * ELEMENT_BYTES[config.precision.grad_reduce])
    return borders * messages + summed


def reduction_bytes(config: Config, parameters: Sequence[LocalParameter], num_ranks: int) -> int:
    """Gradients over `num_ranks` data-parallel ranks, and the parameters back where the optimizer is distributed."""
    numel = sum(parameter.numel for parameter in parameters if parameter.trains)
    gradients = numel * ELEMENT_BYTES[config.precision.grad_reduce]
    if not config.optimizer.distributed:
        return round(2 * ring_share(num_ranks) * gradients)
    return round(ring_share(num_ranks) * (gradients + numel * ELEMENT_BYTES[config.precision.params]))


def media_bytes(config: Config, plans: Sequence[MediaPlan], media_rank: int, hidden: int) -> tuple[int, int]:
    """(features, their gradients) that a rank sends to others in the windows of a step."""
    row_bytes = hidden * ELEMENT_BYTES[config.precision.params]
    trains = config.model.train.vision or config.model.train.projector
    there = back = 0
    for plan in plans:
        route = plan.route(media_rank)
        there += sum(route.send_splits) - route.send_splits[media_rank]
        back += sum(route.grad_send_splits) - route.grad_send_splits[media_rank]
    return there * row_bytes, back * row_bytes if trains else 0
