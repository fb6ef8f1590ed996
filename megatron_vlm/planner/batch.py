"""One global batch to look at: the recipe's own first step where its data are there, else a made-up one, which says so.

No image is opened: token counts are known from metadata (DESIGN D4). The data file's index is built where it is
missing, as training would build it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from megatron_vlm.config.packing import packing_of
from megatron_vlm.config.schema import Config, DataConfig
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.fetch.shape import StepShape
from megatron_vlm.data.fetch.step import StepFetcher
from megatron_vlm.data.plan.batch_exact import LayerWork
from megatron_vlm.data.sources import is_here
from megatron_vlm.data.text.tokenizer import check_vocabulary, load_tokenizer
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.media_plan import MediaItem, MediaPlan, plan_media
from megatron_vlm.parallel.sizes import GridSizes

IMAGES_OF_ROWS = (1, 1, 2, 0, 1, 3, 1, 1)  # drawn from for a made-up batch, as far as they fit
SHORTEST_SHARE = 0.35  # of a made-up row's room for text


@dataclass(frozen=True)
class SampleRow:
    """One row: tokens, images included and padding not; the first token of each image; where rows are packed, the
    tokens of each document."""

    num_tokens: int
    image_starts: tuple[int, ...]
    packed: tuple[int, ...] = ()

    def documents(self, length: int) -> Documents:
        """Documents of the row, which is padded to `length`."""
        return Documents.packed(self.packed, length) if self.packed else Documents.whole(length)


@dataclass(frozen=True)
class ReplicaBatch:
    """The samples of a step that one data-parallel rank's replica is given."""

    micro_batches: tuple[tuple[SampleRow, ...], ...]
    lengths: tuple[int, ...]  # of each one's rows, padding included
    windows: tuple[range, ...]  # of micro-batches
    plans: tuple[MediaPlan, ...]  # by window

    @property
    def padded_tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return sum(len(rows) * length for rows, length in zip(self.micro_batches, self.lengths, strict=True))


@dataclass(frozen=True)
class Batch:
    """A step's rows, by data-parallel rank. `source` says where they are from, in words; `layout` is of the longest."""

    source: str
    layout: SequenceLayout
    tokens_per_image: int
    replicas: tuple[ReplicaBatch, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Rows of the step, and their tokens with padding and without."""
        rows = [row for replica in self.replicas for of_one in replica.micro_batches for row in of_one]
        padded = sum(replica.padded_tokens for replica in self.replicas)
        return {"rows": len(rows), "padded_tokens": padded, "tokens": sum(row.num_tokens for row in rows)}


def first_batch(config: Config, model: ModelDescription, sizes: GridSizes) -> Batch:
    """The batch of step 0.

    Raises:
        DataError, ConfigError: the data are there and cannot be used; what training would say.
    """
    if is_here(config.data):
        return _real_batch(config, model, sizes)
    return _made_batch(config, model, sizes)


def _real_batch(config: Config, model: ModelDescription, sizes: GridSizes) -> Batch:
    language = config.model.language
    tokenizer = load_tokenizer(language.tokenizer or language.path, config.data.image_token)
    check_vocabulary(tokenizer, config.data.image_token, model.language.vocab_size)
    with tempfile.TemporaryDirectory() as folder:  # for an index that cannot be written beside the data
        checkpoint = config.checkpoint.model_copy(update={"directory": folder})
        data = config.data.model_copy(update={"num_workers": 0})
        here = config.model_copy(update={"checkpoint": checkpoint, "data": data})
        fetcher = build_loader(here, tokenizer, model, sizes, 0, 0, 1).producer
        assert isinstance(fetcher, StepFetcher)
        rows = [[fetcher.samples.document(number) for number in row] for row in fetcher.plan.samples_by_row(0)]
    samples = [[SampleRow(len(encoded.ids), tuple(encoded.image_starts)) for _, encoded in row] for row in rows]
    return _cut(config, model, sizes, samples, f"the recipe's first step, from {_name(data)}")


def _name(data: DataConfig) -> str:
    return str(data.path) if data.mixture is None else f"the mixture {data.mixture}"


def _made_batch(config: Config, model: ModelDescription, sizes: GridSizes) -> Batch:
    """Samples of up to training.sequence_length tokens, the first of them as long, with 0 to 3 images each; or rows
    filled with such samples."""
    random, fills_rows = np.random.default_rng(config.runtime.seed), packing_of(config) == "rows"
    length, each = config.training.sequence_length, model.media_spec.tokens_per_image
    rows = []
    for number in range(config.training.global_batch_size):
        samples = [_made_sample(random, length, each, fills=number == 0 and not fills_rows)]
        while fills_rows and (left := length - sum(one.num_tokens for one in samples)):
            samples.append(_made_sample(random, left, each, fills=left < length * SHORTEST_SHARE / 2))
        rows.append(samples)
    return _cut(config, model, sizes, rows, f"a made-up batch, because {_name(config.data)} is not here")


def _made_sample(random: np.random.Generator, length: int, each: int, fills: bool) -> SampleRow:
    """A sample of `length` tokens, or of up to so many."""
    num_images = min(int(random.choice(IMAGES_OF_ROWS)), (length - 1) // each)
    room = length - num_images * each
    num_text = room if fills else max(1, int(room * random.uniform(SHORTEST_SHARE, 1.0)))
    before = num_text // (4 * max(1, num_images))
    starts = tuple(before * (i + 1) + each * i for i in range(num_images))
    return SampleRow(num_text + num_images * each, starts)


def _made_row(samples: Sequence[SampleRow], packs: bool) -> SampleRow:
    """One row of samples, one after the other; where it has none, as `collate_rows` makes it."""
    tokens = [one.num_tokens for one in samples]
    starts = [
        first + start
        for first, one in zip(accumulate(tokens, initial=0), samples, strict=False)
        for start in one.image_starts
    ]
    return SampleRow(sum(tokens), tuple(starts), tuple(tokens or [1]) if packs else ())


def _cut(
    config: Config, model: ModelDescription, sizes: GridSizes, rows: Sequence[Sequence[SampleRow]], source: str
) -> Batch:
    """The step of a plan's rows, given as their samples."""
    samples, ends = [one for row in rows for one in row], list(accumulate(len(row) for row in rows))
    planned = [tuple(range(end - len(row), end)) for row, end in zip(rows, ends, strict=True)]
    shape, spec = StepShape.of(config, sizes, 0, LayerWork.of(model.language)), model.media_spec
    placed = shape.place(planned, np.array([one.num_tokens for one in samples]))
    layout, windows = shape.layout(placed.length), tuple(shape.windows(placed.num_micro_batches))
    replicas = []
    for data, of_rank in enumerate(placed.by_rank):
        micro_batches = tuple(
            tuple(_made_row([samples[i] for i in row], shape.packing != "off") for row in one.rows) for one in of_rank
        )
        lengths = tuple(one.length for one in of_rank)
        plans = tuple(
            plan_media(_items(micro_batches, lengths, window, spec, data), layout, sizes) for window in windows
        )
        replicas.append(ReplicaBatch(micro_batches, lengths, windows, plans))
    if config.parallel.media_group == "world":
        replicas = _share_over_world(replicas, layout, sizes)
    return Batch(source, layout, spec.tokens_per_image, tuple(replicas))


def _share_over_world(replicas: Sequence[ReplicaBatch], layout: SequenceLayout, sizes: GridSizes) -> list[ReplicaBatch]:
    """The same with one plan for all replicas' windows."""
    plans = tuple(
        plan_media([item for plan in of_one_window for item in plan.items], layout, sizes, over_world=True)
        for of_one_window in zip(*(replica.plans for replica in replicas), strict=True)
    )
    return [replace(replica, plans=plans) for replica in replicas]


def _items(
    micro_batches: Sequence[Sequence[SampleRow]], lengths: Sequence[int], window: range, spec: MediaSpec, data: int
) -> list[MediaItem]:
    cost = spec.cost.of(spec.num_patches)
    return [
        MediaItem(cost, spec.tokens_per_image, m, row, start, data, lengths[m])
        for m in window
        for row, sample in enumerate(micro_batches[m])
        for start in sample.image_starts
    ]
