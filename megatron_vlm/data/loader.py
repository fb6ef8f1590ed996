"""The stream of a recipe's steps: index, plan, fetch.

One item of the stream is one step's whole input on this rank, made by a worker process. It is a pure function of the
step's number, so a resumed run, on any layout, goes on with exactly the batches it would have had; every rank of a
replica reads the replica's texts, and only the images it encodes itself.

All rows of one step have one length, on all ranks: training.sequence_length where they are packed, else the longest row
of the global batch, known from the index; rounded up to what the layout can cut. On a GPU rows that are not packed are
rounded up further: cuDNN builds its graphs anew for every length, forward and backward, and keeps them all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import MediaSpan, MediaWindow, StepBatch
from megatron_vlm.data.collate import Document, collate_rows, list_spans
from megatron_vlm.data.conversation import ConversationEncoder
from megatron_vlm.data.index import BadSamplePolicy, SampleIndex, describe_length, open_index
from megatron_vlm.data.media import FAULTS, MediaReader
from megatron_vlm.data.media_windows import SamplePlace, WorldSharing
from megatron_vlm.data.plan import GroupedPlan, PackedPlan, Plan, RowPlan
from megatron_vlm.data.sample import IGNORE, BadSample, Frame, Sample, told_of
from megatron_vlm.data.sources import SOURCES, RecordFile
from megatron_vlm.data.video.files import read_images
from megatron_vlm.data.video.sampling import with_frames
from megatron_vlm.data.workers import OrderedItems
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.models.architectures import attention_windows
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.layout import SequenceLayout, padded_length, row_length
from megatron_vlm.parallel.media_plan import plan_media
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.runtime.device import current_device, is_on_gpu
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.position import HERE

GPU_ROW_MULTIPLE = 64  # of sequences up to 4,096 tokens at most 64 lengths


def build_loader(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelDescription,
    sizes: GridSizes,
    rank: int,
    start_step: int,
    num_steps: int,
) -> OrderedItems[StepBatch]:
    """Steps start_step ... start_step + num_steps - 1 of a recipe, for one rank.

    Args:
        tokenizer: knows the image marker (`load_tokenizer`).
        model: the recipe's.
        sizes, rank: the layout and this rank's place in it.

    Raises:
        DataError: at once, where a sample cannot be used or is longer than training.sequence_length; from iterating,
            where an image cannot be read. Under data.on_bad_sample: skip only where all of them are bad, or the file.
    """
    data = config.data
    source = _open_source(config, data.path, data.media_root, tokenizer, model.media_spec, rank)
    if rank == 0 and (differing := source.encoder.answers_that_differ()):
        get_logger(__name__).warning(
            "the chat template writes the last answer of a conversation otherwise than earlier ones: of an answer '!' "
            "%r is trained where it is the last, and %r where it is not; with data.render_turns: apart each is trained "
            "as the last",
            differing[1], differing[0],
        )  # fmt: skip
    fetcher = StepFetcher(make_plan(config, source.index, model.language), source, StepShape.of(config, sizes, rank))
    longest, length = config.training.sequence_length, row_length(config.training.sequence_length, config.parallel)
    if length != longest:
        get_logger(__name__).info(
            "rows of training.sequence_length %d tokens are padded to %d, which the ranks that share them can cut",
            longest, length,
        )  # fmt: skip
    return OrderedItems(fetcher, range(start_step, start_step + num_steps), data.num_workers, pinning())


def count_rows(config: Config, tokenizer: PreTrainedTokenizerBase, model: ModelDescription, rank: int) -> int:
    """Rows of an epoch of a recipe's training data: its samples, or what they are packed into. Arguments and errors as
    `build_loader`."""
    source = _open_source(config, config.data.path, config.data.media_root, tokenizer, model.media_spec, rank)
    return make_plan(config, source.index, model.language).num_rows


def make_plan(config: Config, samples: SampleIndex, language: PretrainedConfig) -> RowPlan:
    """The order in which a recipe trains its samples; packed ones by what the language model's layers see of them."""
    data, seed, training = config.data, config.runtime.seed, config.training
    if data.packing:
        plan = PackedPlan(
            samples.tokens,
            seed,
            training.global_batch_size,
            training.sequence_length,
            training.micro_batch_size,
            data.shuffle,
            attention_windows(language),
        )
        get_logger(__name__).info("%s", plan)
        return plan
    if data.group_by_modality_length:
        return GroupedPlan(samples, seed, training.global_batch_size)
    return Plan(len(samples), seed, training.global_batch_size, data.shuffle)


def build_held_out_loader(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: ModelDescription, sizes: GridSizes, rank: int
) -> OrderedItems[StepBatch]:
    """Every sample of evaluation.path once, in file order, in steps of the training's shape. The rows that fill up the
    last step are copies in which nothing is trained; rows are never packed. Arguments and errors as `build_loader`."""
    evaluation, batch_size = config.evaluation, config.training.global_batch_size
    assert evaluation.path is not None, "validated with the recipe"
    source = _open_source(config, evaluation.path, evaluation.media_root, tokenizer, model.media_spec, rank)
    num_samples = len(source.index)
    plan = Plan(num_samples, config.runtime.seed, batch_size, shuffle=False)
    fetcher = StepFetcher(plan, source, StepShape.of(config, sizes, rank), num_rows=num_samples)
    return OrderedItems(fetcher, range(-(-num_samples // batch_size)), config.data.num_workers, pinning())


def pinning() -> Callable[[StepBatch], StepBatch] | None:
    """A function by which a thread readies a step before it is asked for: on CUDA, pins it; on the CPU, nothing."""
    if not is_on_gpu():
        return None
    device = current_device()

    def pin(batch: StepBatch) -> StepBatch:
        with torch.cuda.device(device):  # a new thread's is the first GPU, where this rank shall take no memory
            return batch.pinned()

    return pin


def _open_source(
    config: Config,
    path: str,
    media_root: str | None,
    tokenizer: PreTrainedTokenizerBase,
    media_spec: MediaSpec,
    rank: int,
) -> "SampleSource":
    data, sequence_length = config.data, config.training.sequence_length
    encoder = make_encoder(config, tokenizer, media_spec.tokens_per_image)
    file = SOURCES.get(data.source)(path, data.image_token)
    root = Path(media_root) if media_root is not None else file.path.parent
    media = MediaReader(media_spec, data.image_mode)
    skip = BadSamplePolicy(media, sequence_length) if data.on_bad_sample == "skip" else None
    index = open_index(file, encoder, root, Path(config.checkpoint.directory), rank, skip, data.video)
    check_lengths(index, file, sequence_length, media_spec.tokens_per_image)
    return SampleSource(file, index, encoder, media, root, skips_bad=skip is not None)


def make_encoder(config: Config, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int) -> ConversationEncoder:
    """Makes the encoder of a recipe's conversations. Raises ConfigError."""
    limit = config.training.sequence_length if config.data.on_long_sample == "truncate" else None
    return ConversationEncoder.of(config.data, tokenizer, tokens_per_image, limit)


def check_lengths(index: SampleIndex, file: RecordFile, sequence_length: int, tokens_per_image: int) -> None:
    """Raises DataError naming the longest sample where any is longer than the rows may be."""
    num_long = int((index.tokens > sequence_length).sum())
    if num_long:
        longest = int(index.tokens.argmax())
        size = describe_length(int(index.tokens[longest]), index.frame_counts(longest), tokens_per_image)
        raise DataError(
            f"{file.origin(index.extent(longest))}: sample {index.sample_id(longest)!r} has {size}; "
            f"training.sequence_length is {sequence_length} ({num_long} of {len(index)} samples are longer)"
        )


@dataclass(frozen=True)
class StepShape:
    """The cut of a global batch into this rank's micro-batches and windows.

    Global row (m * D + d) * b + i is row i of micro-batch m of data-parallel rank d, of D.
    """

    sizes: GridSizes
    at: Coordinates  # of this rank
    micro_batch_size: int  # b
    num_micro_batches: int
    sequence_length: int  # the most tokens that a row may hold
    row_multiple: int  # rows are made as long as a multiple of it, but no longer than that
    media_window: int  # micro-batches
    sequence_parallel: bool
    media_over_world: bool

    @classmethod
    def of(cls, config: Config, sizes: GridSizes, rank: int) -> "StepShape":
        """The shape of a validated recipe's steps on one rank."""
        training, place = config.training, sizes.coordinates(rank)
        rows_per_round = training.micro_batch_size * sizes.data
        assert training.global_batch_size % rows_per_round == 0, "validated with the recipe"
        num_micro_batches = training.global_batch_size // rows_per_round
        return cls(
            sizes=sizes,
            at=place,
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=num_micro_batches,
            sequence_length=training.sequence_length,
            row_multiple=config.data.pad_to_multiple_of or (GPU_ROW_MULTIPLE if is_on_gpu() else 1),
            media_window=training.media_window or num_micro_batches,
            sequence_parallel=config.parallel.sequence,
            media_over_world=config.parallel.media_group == "world",
        )

    def layout(self, longest: int) -> SequenceLayout:
        """The layout of rows that hold `longest` tokens."""
        cut = (self.sizes.ring, self.sizes.ulysses, self.sizes.tensor if self.sequence_parallel else 1)
        rounded = min(-(-longest // self.row_multiple) * self.row_multiple, self.sequence_length)
        return SequenceLayout(padded_length(rounded, *cut), *cut)

    def rows_of(self, micro_batch: int, data_rank: int | None = None) -> range:
        """The global batch's rows that are in one micro-batch of a data-parallel rank, by default this one's."""
        data_rank = self.at.data if data_rank is None else data_rank
        first = (micro_batch * self.sizes.data + data_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


@dataclass(frozen=True)
class SampleSource:
    """Samples by number, read and encoded, and their images."""

    file: RecordFile
    index: SampleIndex
    encoder: ConversationEncoder
    media: MediaReader
    media_root: Path
    skips_bad: bool  # an image that cannot be read is blanked

    def sample(self, number: int) -> Sample:
        """One sample, with its videos' frames. Raises DataError where the file is gone, or this is no longer in it."""
        extent, counts = self.index.extent(number), self.index.frame_counts(number)
        with told_of(self.file.origin(extent)):
            sample = self.file.read(extent)
        if len(sample.videos) != len(counts):
            raise self._changed(sample, f"{len(sample.videos)} videos, {len(counts)}")
        parts = self.encoder.split(with_frames(sample, counts, self.encoder.image_token))
        if (part := self.index.part(number)) >= len(parts):
            raise self._changed(sample, f"{len(parts)} answers, {part + 1} or more")
        return parts[part]

    def document(self, number: int) -> Document:
        """One sample. Raises DataError where it is no longer what was indexed."""
        HERE.sample(self.index.sample_id(number))
        sample = self.sample(number)
        with told_of(f"{sample.origin}: sample {sample.id!r}"):
            encoded = self.encoder.encode(sample)
        if len(encoded.ids) != self.index.tokens[number]:
            raise self._changed(sample, f"{len(encoded.ids)} tokens, {self.index.tokens[number]}")
        return sample, encoded

    def _changed(self, sample: Sample, found: str) -> DataError:
        return DataError(
            f"{sample.origin}: sample {sample.id!r} has {found} when it was indexed; the file changed during the run "
            f"(its index is {self.index.folder})"
        )

    def pixels(self, spans: Sequence[MediaSpan]) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels [n, 3, H, W] of the given images (n may be 0), and their faults. Frames of one video that stand
        together are read together. Raises BadSample where the first that cannot be read is not to be blanked."""
        spec = self.media.spec
        pixels = torch.empty(len(spans), 3, spec.height, spec.width)
        faults = [0] * len(spans)
        number = 0
        for run in _runs(spans):
            stop = number + len(run)
            HERE.sample(run[0].sample_id)
            try:
                paths = [span.path for span in run]
                for image in read_images(self.media, paths, self.media_root, f"sample {run[0].sample_id!r}"):
                    pixels[number] = image
                    number += 1
            except BadSample as error:
                if not self.skips_bad:
                    raise
                get_logger(__name__).warning("%s; it is blanked and the sample not trained", one_line(error))
                pixels[number:stop] = self.media.blank_pixels()
                faults[number:stop] = [FAULTS.index(error.reason)] * (stop - number)
            number = stop
        return pixels, tuple(faults)


def _runs(spans: Sequence[MediaSpan]) -> Iterator[list[MediaSpan]]:
    """Images one by one, and frames of one video, ascending, together."""
    run: list[MediaSpan] = []
    for span in spans:
        last = run[-1].path if run else None
        follows = isinstance(span.path, Frame) and isinstance(last, Frame) and span.path.follows(last)
        if run and not (follows and run[-1].sample_id == span.sample_id):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


@dataclass(frozen=True)
class StepFetcher:
    """Makes a step's input from its number. `num_rows`: of all steps together; those after them are copies, in which
    nothing is trained. None: the rows never end."""

    plan: RowPlan
    source: SampleSource
    shape: StepShape
    num_rows: int | None = None

    def produce(self, number: int) -> StepBatch:
        """The input of step `number`. Raises DataError."""
        index, shape, packed_length = self.source.index, self.shape, self.plan.packed_length
        numbers = self.plan.samples_by_row(number)
        row_tokens = [int(index.tokens[list(samples)].sum()) for samples in numbers]
        layout = shape.layout(packed_length or max(row_tokens))
        num_real = len(numbers) if self.num_rows is None else min(len(numbers), self.num_rows - number * len(numbers))
        rows, micro_batches = [], []
        for m in range(shape.num_micro_batches):
            local = shape.rows_of(m)
            rows.append([[self.source.document(sample) for sample in numbers[row]] for row in local])
            copies = [i for i, row in enumerate(local) if row >= num_real]
            micro_batches.append(collate_rows(rows[-1], layout.length, packed_length is not None).without(copies))
        firsts = range(0, shape.num_micro_batches, shape.media_window)
        real = [sample for samples in numbers[:num_real] for sample in samples]
        return StepBatch(
            step=number,
            length=layout.length,
            micro_batches=tuple(micro_batches),
            windows=tuple(
                self._window(first, rows[first : first + shape.media_window], numbers, layout) for first in firsts
            ),
            sample_ids=tuple(index.sample_id(sample) for sample in real),
            sample_tokens=tuple(index.tokens[real].tolist()),
            row_tokens=tuple(row_tokens[:num_real]),
            num_media=int(index.images[real].sum()),
            num_trained_tokens_local=sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches),
            faults_tolerated=self.source.skips_bad,
        )

    def _window(
        self,
        first: int,
        rows: Sequence[Sequence[Sequence[Document]]],
        numbers: Sequence[tuple[int, ...]],
        layout: SequenceLayout,
    ) -> MediaWindow:
        """The window of this rank's micro-batches `rows`, `first` and following, of a step of the samples `numbers`."""
        shape, spec = self.shape, self.source.media.spec
        cost = spec.cost.of(spec.num_patches)
        spans = [
            span
            for m, of_one in enumerate(rows, start=first)
            for span in list_spans(of_one, m, spec.tokens_per_image, cost)
        ]
        if shape.media_over_world:
            sharing = WorldSharing(shape.sizes, shape.at, spec.tokens_per_image, cost, self.source.document)
            plan, own = sharing.share(spans, self._places(range(first, first + len(rows)), numbers), layout)
        else:
            plan = plan_media([span.item for span in spans], layout, shape.sizes)
            own = tuple(spans[item] for item in plan.items_of(plan.media_rank(shape.at)))
        route = plan.route(plan.media_rank(shape.at))
        return MediaWindow(first, len(rows), tuple(spans), own, plan, route, *self.source.pixels(own))

    def _places(self, micro_batches: range, numbers: Sequence[tuple[int, ...]]) -> list[SamplePlace]:
        """Places of the samples of some micro-batches of all replicas."""
        index, shape = self.source.index, self.shape
        return [
            SamplePlace(sample, int(index.images[sample]), data, m, number, start)
            for data in range(shape.sizes.data)
            for m in micro_batches
            for number, row in enumerate(shape.rows_of(m, data))
            for sample, start in zip(numbers[row], _starts(index.tokens[list(numbers[row])]), strict=True)
        ]


def _starts(lengths: np.ndarray) -> list[int]:
    """The first token of each of several documents, one after the other: [n] -> n."""
    return (np.cumsum(lengths, dtype=np.int64) - lengths).tolist()
