"""Samples by their number in the index, read and encoded when a step wants them, and their images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_vlm.config.mixture import Part
from megatron_vlm.config.schema import Config, DataConfig
from megatron_vlm.data.batch import MediaSpan
from megatron_vlm.data.fetch.collate import Document
from megatron_vlm.data.index.building import BadSamplePolicy, describe_length
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.index.choice import Side, choose, nothing_left
from megatron_vlm.data.index.mixed import IndexedSource, MixedIndex
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.media.images import FAULTS, MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import BadSample, Frame, Sample, told_of, with_marker
from megatron_vlm.data.sources import Source, make_source
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.position import HERE


@dataclass(frozen=True)
class SourceReader:
    """Samples of one source by their number in its index, read and encoded, and their images.

    Args:
        number: of the source in the mixture, for its samples.
    """

    source: Source
    index: SampleIndex
    encoder: ConversationEncoder
    store: MediaStore
    number: int = 0

    def sample(self, number: int) -> Sample:
        """One sample, with its videos' frames. Raises DataError where the file is gone, or this is no longer in it."""
        key, counts = self.index.key(number), self.index.frame_counts(number)
        with told_of(self.source.origin(key)):
            sample = self.source.sample(key)
        if len(sample.videos) != len(counts):
            raise self._changed(sample, f"{len(sample.videos)} videos, {len(counts)}")
        shown = with_frames(sample, counts, self.source.image_token)
        parts = self.encoder.split(with_marker(shown, self.source.image_token, self.encoder.image_token))
        if (part := self.index.part(number)) >= len(parts):
            raise self._changed(sample, f"{len(parts)} answers, {part + 1} or more")
        return replace(parts[part], source=self.number)

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


@dataclass(frozen=True)
class SampleReader:
    """Samples of all sources by number, read and encoded, and their images.

    Args:
        index: all samples that are used.
        sources: in the index's order.
        media: prepares images.
        skips_bad: an image that cannot be read is blanked.
    """

    index: MixedIndex
    sources: tuple[SourceReader, ...]
    media: MediaReader
    skips_bad: bool

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return ", ".join(reader.source.name for reader in self.sources)

    def sample(self, number: int) -> Sample:
        """One sample, with its videos' frames. Raises DataError where the file is gone, or this is no longer in it."""
        source, own_number = self.index.place(number)
        return self.sources[source].sample(own_number)

    def document(self, number: int) -> Document:
        """One sample. Raises DataError where it is no longer what was indexed."""
        source, own_number = self.index.place(number)
        return self.sources[source].document(own_number)

    def store(self, number: int) -> MediaStore:
        """The places of a sample's images."""
        return self.sources[self.index.place(number)[0]].store

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
                paths, store = [span.path for span in run], self.sources[run[0].source].store
                for image in read_images(self.media, paths, store, f"sample {run[0].sample_id!r}"):
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
        if run and not (follows and (run[-1].source, run[-1].sample_id) == (span.source, span.sample_id)):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def open_samples(
    config: Config,
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    media_spec: MediaSpec,
    rank: int,
    side: Side = "trained",
) -> SampleReader:
    """Opens the samples of a recipe's data.

    Args:
        parts: its sources.
        side: of their splits; what is held out comes once, whatever the weights, and from sources that have some.

    Raises:
        DataError: as `open_index` and `check_lengths`; nothing is left of a source, or of all that is held out.
        ConfigError: a format or template that there is not, or that cannot be used.
    """
    media = MediaReader(media_spec, config.data.image_mode)
    seed, readers, used = config.runtime.seed, list[SourceReader](), list[IndexedSource]()
    for part in parts:
        reader = replace(_open(config, part, tokenizer, media, rank), number=len(readers))
        numbers = choose(reader.index, reader.source, part, side, seed)
        if numbers is not None and not len(numbers):
            if side == "trained":
                raise nothing_left(part, reader.source.name)
            continue
        weight = part.weight if side == "trained" else Fraction(1)
        readers.append(reader)
        asked_as = reader.encoder.describe() if _renders_otherwise(part.data, config.data) else ""
        used.append(IndexedSource(str(part.slot), reader.index, numbers, weight, asked_as))
    if not readers:
        raise DataError("data.held_out: holds out no sample of any source, needs a larger share, or evaluation.path")
    return SampleReader(MixedIndex(used), tuple(readers), media, config.data.on_bad_sample == "skip")


def _renders_otherwise(data: DataConfig, recipe: DataConfig) -> bool:
    """Whether a source's conversations become text in another way than the recipe says."""
    return any(getattr(data, key) != getattr(recipe, key) for key in ("template", "template_arguments", "render_turns"))


def _open(
    config: Config, part: Part, tokenizer: PreTrainedTokenizerBase, media: MediaReader, rank: int
) -> SourceReader:
    data, sequence_length = part.data, config.training.sequence_length
    tokens_per_image = media.spec.tokens_per_image
    encoder = make_encoder(config, tokenizer, tokens_per_image, data)
    source = make_source(data, data.path)
    store = MediaStore.of(source, data.media_root)
    skip = BadSamplePolicy(media, sequence_length) if data.on_bad_sample == "skip" else None
    index = open_index(source, encoder, store, Path(config.checkpoint.directory), rank, skip, data.video)
    check_lengths(index, source, sequence_length, tokens_per_image)
    return SourceReader(source, index, encoder, store)


def make_encoder(
    config: Config, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int, data: DataConfig | None = None
) -> ConversationEncoder:
    """Makes the encoder of a recipe's conversations. Raises ConfigError.

    Args:
        data: what a source says otherwise (`config.mixture.Part`). The marker that it has in its files is read as the
            recipe's, which alone the tokenizer knows.
    """
    data = (data or config.data).model_copy(update={"image_token": config.data.image_token})
    limit = config.training.sequence_length if data.on_long_sample == "truncate" else None
    return ConversationEncoder.of(data, tokenizer, tokens_per_image, limit)


def check_lengths(index: SampleIndex, source: Source, sequence_length: int, tokens_per_image: int) -> None:
    """Raises DataError naming the longest sample where any is longer than the rows may be."""
    num_long = int((index.tokens > sequence_length).sum())
    if num_long:
        longest = int(index.tokens.argmax())
        size = describe_length(int(index.tokens[longest]), index.frame_counts(longest), tokens_per_image)
        raise DataError(
            f"{source.origin(index.key(longest))}: sample {index.sample_id(longest)!r} has {size}; "
            f"training.sequence_length is {sequence_length} ({num_long} of {len(index)} samples are longer)"
        )
