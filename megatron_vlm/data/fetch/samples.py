"""Samples by their number in the index, read and encoded when a step wants them, and their images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import MediaSpan
from megatron_vlm.data.fetch.collate import Document
from megatron_vlm.data.index.building import BadSamplePolicy, describe_length
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.media.images import FAULTS, MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import BadSample, Frame, Sample, told_of
from megatron_vlm.data.sources import Source, make_source
from megatron_vlm.data.sources.base import Paths
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.position import HERE


@dataclass(frozen=True)
class SampleReader:
    """Samples by number, read and encoded, and their images."""

    source: Source
    index: SampleIndex
    encoder: ConversationEncoder
    media: MediaReader
    store: MediaStore
    skips_bad: bool  # an image that cannot be read is blanked

    def sample(self, number: int) -> Sample:
        """One sample, with its videos' frames. Raises DataError where the file is gone, or this is no longer in it."""
        key, counts = self.index.key(number), self.index.frame_counts(number)
        with told_of(self.source.origin(key)):
            sample = self.source.sample(key)
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
                for image in read_images(self.media, paths, self.store, f"sample {run[0].sample_id!r}"):
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


def open_samples(
    config: Config,
    path: Paths,
    media_root: str | None,
    tokenizer: PreTrainedTokenizerBase,
    media_spec: MediaSpec,
    rank: int,
) -> SampleReader:
    """Opens the samples of a recipe's data. Raises DataError as `open_index` and `check_lengths`, ConfigError."""
    data, sequence_length = config.data, config.training.sequence_length
    encoder = make_encoder(config, tokenizer, media_spec.tokens_per_image)
    source = make_source(data, path)
    store = MediaStore.of(source, media_root)
    media = MediaReader(media_spec, data.image_mode)
    skip = BadSamplePolicy(media, sequence_length) if data.on_bad_sample == "skip" else None
    index = open_index(source, encoder, store, Path(config.checkpoint.directory), rank, skip, data.video)
    check_lengths(index, source, sequence_length, media_spec.tokens_per_image)
    return SampleReader(source, index, encoder, media, store, skips_bad=skip is not None)


def make_encoder(config: Config, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int) -> ConversationEncoder:
    """Makes the encoder of a recipe's conversations. Raises ConfigError."""
    limit = config.training.sequence_length if config.data.on_long_sample == "truncate" else None
    return ConversationEncoder.of(config.data, tokenizer, tokens_per_image, limit)


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
