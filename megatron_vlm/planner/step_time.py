"""A step in time: how long each rank encodes, runs its passes and waits, in matrix FLOPs.

FLOPs stand for time because they are known without a machine: on ranks of equal speed the drawing is the step's, less
what is not a matrix product and what messages cost. Each text token is taken to train, padding counts as computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vlm.config.schema import Config
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.parallel.layout import causal_pairs
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.planner.batch import Batch
from megatron_vlm.planner.flops import Block, ModelShape, model_shape
from megatron_vlm.planner.timeline import Timeline, simulate


@dataclass(frozen=True)
class WindowTime:
    """One media window of a replica. Its phases follow one another: what a rank has less to do, it waits."""

    micro_batches: range
    encode: tuple[float, ...]  # FLOPs by replica rank
    pipeline: Timeline
    encoder_backward: tuple[float, ...]

    @property
    def length(self) -> float:
        """Time from its start to its end."""
        return max(self.encode) + self.pipeline.length + max(self.encoder_backward)


@dataclass(frozen=True)
class StepTime:
    """A replica's step."""

    windows: tuple[WindowTime, ...]

    @property
    def length(self) -> float:
        """Time of the whole step, the update left out."""
        return sum(window.length for window in self.windows)

    @property
    def bubble(self) -> float:
        """The share of the pipeline phases in which the stages wait."""
        lines = [window.pipeline for window in self.windows]
        total = sum(line.length for line in lines)
        return sum(line.bubble * line.length for line in lines) / total if total else 0.0

    @property
    def phases(self) -> dict[str, float]:
        """FLOPs of the slowest rank by phase."""
        return {
            "encode": sum(max(window.encode) for window in self.windows),
            "pipeline": sum(window.pipeline.length for window in self.windows),
            "encoder_backward": sum(max(window.encoder_backward) for window in self.windows),
        }


def step_times(
    config: Config, sizes: GridSizes, encoder: VisionEncoder, spec: LanguageSpec, batch: Batch
) -> tuple[StepTime, ...]:
    """Times of a step by replica."""
    shape = model_shape(encoder, spec, config.model)
    image = _image(config, shape)
    return tuple(
        StepTime(
            tuple(_window(config, sizes, shape, batch, data, number, image) for number in range(len(replica.windows)))
        )
        for data, replica in enumerate(batch.replicas)
    )


def _window(
    config: Config,
    sizes: GridSizes,
    shape: ModelShape,
    batch: Batch,
    data: int,
    number: int,
    image: tuple[float, float],
) -> WindowTime:
    replica = batch.replicas[data]
    window, plan = replica.windows[number], replica.plans[number]
    ranks = sizes.replica_ranks(data)
    images = [len(plan.items_of(plan.media_rank(sizes.coordinates(rank)))) for rank in ranks]
    num_tokens = sum(row.num_tokens - len(row.image_starts) * batch.tokens_per_image
                     for m in window for row in replica.micro_batches[m])  # fmt: skip
    computed = _Computed(
        sum(len(replica.micro_batches[m]) * replica.lengths[m] for m in window) / len(window),
        num_tokens / len(window),
        {
            block.window: sum(
                causal_pairs(tokens, block.window)
                for m in window
                for row in replica.micro_batches[m]
                for tokens in row.packed or (replica.lengths[m],)
            )
            / len(window)
            for block in shape.language
        },
    )
    forward, backward = _stage_flops(config, sizes, shape, computed)
    if config.training.mode == "eval":
        backward = [0.0] * len(backward)
    return WindowTime(
        window,
        tuple(count * image[0] for count in images),
        simulate(len(window), sizes.pipeline, forward, backward),
        tuple(count * image[1] for count in images),
    )


def _image(config: Config, shape: ModelShape) -> tuple[float, float]:
    """FLOPs of one image, forward and backward."""
    chain: list[tuple[Sequence[Block], int, int]] = [
        ((shape.embedding,), shape.patches, 0),
        (shape.tower, shape.tower_tokens, shape.tower_tokens**2),
        (shape.projector, shape.media_tokens, 0),
    ]
    recompute = config.training.recompute.vision
    forward = backward = 0.0
    trains = False
    for blocks, tokens, pairs in chain:
        for block in blocks:
            ahead = _forward(block, tokens, pairs)
            forward += ahead
            backward += block.flops(tokens, pairs, trains) - ahead
            trains |= block.trains
            backward += ahead if recompute == "full" and trains and blocks is shape.tower else 0
    if recompute == "encoder" and trains:
        tower_trains = any(block.trains for block in (shape.embedding, *shape.tower))
        projector = sum(_forward(block, shape.media_tokens, 0) for block in shape.projector)
        backward += forward if tower_trains else projector
    return forward, backward


@dataclass(frozen=True)
class _Computed:
    """Tokens and pairs that the language model computes of a window's micro-batch, in the mean.

    Args:
        tokens: padding included.
        trained_tokens: of those.
        pairs: of query and key, by the window of a layer.
    """

    tokens: float
    trained_tokens: float
    pairs: Mapping[int | None, float]


def _stage_flops(
    config: Config, sizes: GridSizes, shape: ModelShape, computed: _Computed
) -> tuple[list[float], list[float]]:
    """FLOPs of a micro-batch, forward and backward, by virtual stage, on one of its tensor ranks."""
    recompute, tokens = config.training.recompute.language, round(computed.tokens)
    num_virtual = sizes.pipeline * config.parallel.virtual_pipeline
    layers = shape.language[1:-1]
    each = len(layers) // num_virtual
    share = sizes.tensor * sizes.context
    forward, backward = [], []
    for virtual in range(num_virtual):
        ahead = back = 0.0
        for block in layers[virtual * each : (virtual + 1) * each]:
            pairs = round(computed.pairs[block.window])
            once = _forward(block, tokens, pairs)
            again = {"none": 0, "selective": 4 * pairs * block.attention_width, "full": once}[recompute]
            ahead += once
            back += block.flops(tokens, pairs, trains_before=True) - once + again
        if virtual == num_virtual - 1:
            once = _forward(shape.head, round(computed.trained_tokens), 0)
            ahead += once
            back += shape.head.flops(round(computed.trained_tokens), 0, trains_before=True) - once
        forward.append(ahead / share)
        backward.append(back / share)
    return forward, backward


def _forward(block: Block, tokens: int, pairs: int) -> int:
    return 2 * tokens * block.weights + 4 * pairs * block.attention_width
