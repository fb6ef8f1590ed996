"""From a recipe to a stream of steps: index, plan, fetch.

One item of the stream is one step's whole input on this rank, made by a worker process. It is a pure function of the
step's number, so a resumed run, on any layout, goes on with exactly the batches it would have had; every rank of a
replica reads the replica's texts, and only the pictures it encodes itself.

All rows of one step have one length, on all ranks: the longest row of the global batch, known from the index, rounded
up to what the layout can cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import MediaSpan, MediaWindow, StepBatch
from megatron_vlm.data.collate import Row, collate_rows, list_spans
from megatron_vlm.data.conversation import ConversationEncoder
from megatron_vlm.data.index import SampleIndex, SkipRule, open_index
from megatron_vlm.data.media import FAULTS, MediaReader
from megatron_vlm.data.plan import GroupedPlan, Plan
from megatron_vlm.data.sample import IGNORE, BadSample
from megatron_vlm.data.sources import SOURCES, RecordFile
from megatron_vlm.data.workers import OrderedItems
from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.layout import SequenceLayout, padded_length
from megatron_vlm.parallel.media_plan import media_cost, plan_media
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.runtime.logging import get_logger


def build_loader(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    media_spec: MediaSpec,
    sizes: GridSizes,
    rank: int,
    start_step: int,
    num_steps: int,
) -> OrderedItems[StepBatch]:
    """Steps start_step ... start_step + num_steps - 1 of a recipe, for one rank.

    Args:
        tokenizer: knows the image marker (`load_tokenizer`).
        media_spec: of the recipe's vision tower.
        sizes, rank: the layout and this rank's place in it.

    Raises:
        DataError: at once, where a sample cannot be used or is longer than training.sequence_length; from iterating,
            where a picture cannot be read. Under data.on_bad_sample: skip only where all of them are bad, or the file.
    """
    data, seed, batch_size = config.data, config.runtime.seed, config.training.global_batch_size
    source = _open_source(config, data.path, data.media_root, tokenizer, media_spec, rank)
    plan = (
        GroupedPlan(source.index, seed, batch_size)
        if data.group_by_modality_length
        else Plan(len(source.index), seed, batch_size, data.shuffle)
    )
    fetcher = StepFetcher(plan, source, StepShape.of(config, sizes, rank))
    return OrderedItems(fetcher, range(start_step, start_step + num_steps), data.num_workers)


def build_held_out_loader(
    config: Config, tokenizer: PreTrainedTokenizerBase, media_spec: MediaSpec, sizes: GridSizes, rank: int
) -> OrderedItems[StepBatch]:
    """Every sample of evaluation.path once, in file order, in steps of the training's shape. The rows that fill up the
    last step are copies in which nothing is trained. Arguments and errors as `build_loader`."""
    evaluation, batch_size = config.evaluation, config.training.global_batch_size
    assert evaluation.path is not None, "validated with the recipe"
    source = _open_source(config, evaluation.path, evaluation.media_root, tokenizer, media_spec, rank)
    num_samples = len(source.index)
    plan = Plan(num_samples, config.runtime.seed, batch_size, shuffle=False)
    fetcher = StepFetcher(plan, source, StepShape.of(config, sizes, rank), num_rows=num_samples)
    return OrderedItems(fetcher, range(-(-num_samples // batch_size)), config.data.num_workers)


def _open_source(
    config: Config,
    path: str,
    media_root: str | None,
    tokenizer: PreTrainedTokenizerBase,
    media_spec: MediaSpec,
    rank: int,
) -> "SampleSource":
    data, sequence_length = config.data, config.training.sequence_length
    encoder = ConversationEncoder(tokenizer, data.template, data.image_token, media_spec.tokens_per_image)
    file = SOURCES.get(data.source)(path, data.image_token)
    root = Path(media_root) if media_root is not None else file.path.parent
    media = MediaReader(media_spec, data.image_mode)
    skip = SkipRule(media, sequence_length) if data.on_bad_sample == "skip" else None
    index = open_index(file, encoder, root, Path(config.checkpoint.directory), rank, skip)
    check_lengths(index, file, sequence_length)
    return SampleSource(file, index, encoder, media, root, tolerant=skip is not None)


def check_lengths(index: SampleIndex, file: RecordFile, sequence_length: int) -> None:
    """Raises DataError naming the longest sample where any is longer than the rows may be."""
    num_long = int((index.tokens > sequence_length).sum())
    if num_long:
        longest = int(index.tokens.argmax())
        raise DataError(
            f"{file.origin(index.extent(longest))}: sample {index.sample_id(longest)!r} has {index.tokens[longest]} "
            f"tokens, pictures included; training.sequence_length is {sequence_length} ({num_long} of {len(index)} "
            "samples are longer)"
        )


@dataclass(frozen=True)
class StepShape:
    """How a global batch is cut into this rank's micro-batches and windows.

    Global row (m * D + d) * b + i is row i of micro-batch m of data-parallel rank d, of D.
    """

    sizes: GridSizes
    data_rank: int
    replica_rank: int
    micro_batch_size: int  # b
    num_micro_batches: int
    media_window: int  # micro-batches
    sequence_length: int  # longest row allowed
    sequence_parallel: bool

    @classmethod
    def of(cls, config: Config, sizes: GridSizes, rank: int) -> "StepShape":
        """The shape of a validated recipe's steps on one rank."""
        training, place = config.training, sizes.coordinates(rank)
        rows_per_round = training.micro_batch_size * sizes.data
        assert training.global_batch_size % rows_per_round == 0, "validated with the recipe"
        num_micro_batches = training.global_batch_size // rows_per_round
        return cls(
            sizes=sizes,
            data_rank=place.data,
            replica_rank=sizes.replica_rank(place),
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=num_micro_batches,
            media_window=training.media_window or num_micro_batches,
            sequence_length=training.sequence_length,
            sequence_parallel=config.parallel.sequence,
        )

    def layout(self, longest: int) -> SequenceLayout:
        """The layout of rows that hold `longest` tokens."""
        cut = (self.sizes.ring, self.sizes.ulysses, self.sizes.tensor if self.sequence_parallel else 1)
        length = padded_length(longest, *cut)
        assert length <= self.sequence_length, "training.sequence_length is validated to fit the layout"
        return SequenceLayout(length, *cut)

    def rows_of(self, micro_batch: int) -> range:
        """The global batch's rows that are this rank's in one micro-batch."""
        first = (micro_batch * self.sizes.data + self.data_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


@dataclass(frozen=True)
class SampleSource:
    """Samples by number, read and encoded, and their pictures."""

    file: RecordFile
    index: SampleIndex
    encoder: ConversationEncoder
    media: MediaReader
    media_root: Path
    tolerant: bool  # a picture that cannot be read is blanked

    def row(self, number: int) -> Row:
        """One sample. Raises DataError where it is no longer what was indexed."""
        sample = self.file.read(self.index.extent(number))
        encoded = self.encoder.encode(sample)
        if len(encoded.ids) != self.index.tokens[number]:
            raise DataError(
                f"{sample.origin}: sample {sample.id!r} has {len(encoded.ids)} tokens, "
                f"{self.index.tokens[number]} when it was indexed; the file changed during the run "
                f"(its index is {self.index.folder})"
            )
        return sample, encoded

    def pictures(self, spans: Sequence[MediaSpan]) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels [n, 3, H, W] of the given pictures (n may be 0), and their faults. Raises BadSample where the first
        that cannot be read is not to be blanked."""
        spec = self.media.spec
        pixels = torch.empty(len(spans), 3, spec.height, spec.width)
        faults = [0] * len(spans)
        for number, span in enumerate(spans):
            try:
                pixels[number] = self.media.read(self.media_root / span.path, f"sample {span.sample_id!r}")
            except BadSample as error:
                if not self.tolerant:
                    raise
                get_logger(__name__).warning("%s; it is blanked and the sample not trained", error)
                pixels[number] = self.media.blank_pixels()
                faults[number] = FAULTS.index(error.reason)
        return pixels, tuple(faults)


@dataclass(frozen=True)
class StepFetcher:
    """Makes a step's input from its number. `num_rows`: of all steps together; those after them are copies, in which
    nothing is trained. None: the rows never end."""

    plan: Plan
    source: SampleSource
    shape: StepShape
    num_rows: int | None = None

    def produce(self, number: int) -> StepBatch:
        """The input of step `number`. Raises DataError."""
        index, shape = self.source.index, self.shape
        numbers = self.plan.rows(number)
        layout = shape.layout(int(index.tokens[numbers].max()))
        num_real = len(numbers) if self.num_rows is None else min(len(numbers), self.num_rows - number * len(numbers))
        rows, micro_batches = [], []
        for m in range(shape.num_micro_batches):
            local = shape.rows_of(m)
            rows.append([self.source.row(numbers[row]) for row in local])
            copies = [i for i, row in enumerate(local) if row >= num_real]
            micro_batches.append(collate_rows(rows[-1], layout.length).without(copies))
        firsts = range(0, shape.num_micro_batches, shape.media_window)
        real = numbers[:num_real]
        return StepBatch(
            step=number,
            length=layout.length,
            micro_batches=tuple(micro_batches),
            windows=tuple(self._window(first, rows[first : first + shape.media_window], layout) for first in firsts),
            sample_ids=tuple(index.sample_id(sample) for sample in real),
            row_tokens=tuple(index.tokens[real].tolist()),
            num_media=int(index.images[real].sum()),
            num_trained_tokens_local=sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches),
            faults_tolerated=self.source.tolerant,
        )

    def _window(self, first: int, rows: Sequence[Sequence[Row]], layout: SequenceLayout) -> MediaWindow:
        spec = self.source.media.spec
        cost = media_cost(spec.num_patches)
        spans = [
            span
            for m, of_one in enumerate(rows, start=first)
            for span in list_spans(of_one, m, spec.tokens_per_image, cost)
        ]
        plan = plan_media([span.item for span in spans], layout, self.shape.sizes)
        own = tuple(spans[item] for item in plan.items_of(self.shape.replica_rank))
        return MediaWindow(first, len(rows), tuple(spans), own, plan, *self.source.pictures(own))
