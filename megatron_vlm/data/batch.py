"""The data of a step: token rows of this rank's micro-batches, and the images it encodes itself.

All of it is made by a data worker; the plan of the media exchange comes along, so the training process computes nothing
but the step.

b rows of a micro-batch; s tokens of each of its rows; n images this rank encodes; H W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vlm.data.sample import IGNORE, ImageRef
from megatron_vlm.parallel.layout import Documents, Interval
from megatron_vlm.parallel.media_plan import MediaItem, MediaPlan, Route


@dataclass(frozen=True)
class MicroBatch:
    """Whole rows, before any cut over ranks. All int64.

    A row is one sample, or several where rows are packed (`data.packing`): then each is one of the row's `documents`,
    and padding another. A row that is not packed is one document, padding included. One without a sample, which fills
    up the micro-batch, has a document of one token that is not trained.
    """

    ids: Tensor  # [b, s]; placeholders and padding carry a valid id
    labels: Tensor  # [b, s]; already shifted: the token after this one, -100 where that is not trained
    position_ids: Tensor  # [b, s]; from 0 in every document
    documents: tuple[Documents, ...]  # by row
    sample_ids: tuple[str, ...]  # in row order, in a row in document order
    sources: Tensor | None = None  # [b, s]; number of the token's source in a mixture; None: there is one
    num_sources: int = 0  # of that mixture

    @property
    def length(self) -> int:
        """Tokens of each row, padding included."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on a device."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def without(self, rows: Sequence[int]) -> "MicroBatch":
        """The same rows with nothing trained in the given ones."""
        if not rows:
            return self
        labels = self.labels.clone()
        labels[list(rows)] = IGNORE
        return replace(self, labels=labels)

    def at(self, positions: Tensor) -> "MicroBatch":
        """A rank's part of the rows: the tokens at global positions [n]. `documents` stay those of whole rows."""
        return self._each(lambda x: x[:, positions])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same, every tensor [b, s] changed."""
        ids, labels, position_ids = (change(tensor) for tensor in (self.ids, self.labels, self.position_ids))
        sources = None if self.sources is None else change(self.sources)
        return replace(self, ids=ids, labels=labels, position_ids=position_ids, sources=sources)

    def document(self, row: int, position: int) -> Interval:
        """Interval of the document that a token is in: its start and its row are the document's name."""
        documents = self.documents[row]
        return documents.interval(documents.number(position))

    def without_documents(self, places: Iterable[tuple[int, int]]) -> "MicroBatch":
        """The same rows with nothing trained in some documents.

        Args:
            places: row and position of any token of each.
        """
        labels = self.labels.clone()
        for row, position in places:
            document = self.document(row, position)
            labels[row, document.start : document.stop] = IGNORE
        return replace(self, labels=labels)


@dataclass(frozen=True)
class MediaSpan:
    """An image of the window: whose it is, its file or frame, the tokens it was given, and its source in a mixture."""

    sample_id: str
    path: ImageRef
    item: MediaItem
    source: int = 0


@dataclass(frozen=True)
class MediaWindow:
    """Consecutive micro-batches whose images are encoded together.

    `spans` are all images of this replica's window, in plan order; `own_spans` those this rank encodes, in the order
    of `pixels` [n, 3, H, W]. `faults` says of each of the latter why it could not be read and is blank instead (an
    index into `media.FAULTS`), 0 where it was; all 0 under `data.on_bad_sample: error`. `route` is this rank's of the
    plan: for long videos it takes a while, which is spent here, ahead of the step.
    """

    first_micro_batch: int
    num_micro_batches: int
    spans: tuple[MediaSpan, ...]
    own_spans: tuple[MediaSpan, ...]
    plan: MediaPlan
    route: Route
    pixels: Tensor
    faults: tuple[int, ...]

    @property
    def micro_batches(self) -> range:
        """Indices in the step of the window's micro-batches."""
        return range(self.first_micro_batch, self.first_micro_batch + self.num_micro_batches)


@dataclass(frozen=True)
class StepBatch:
    """One step's input on one rank; the counts and ids without 'local' are of the global batch, without the copies that
    fill up the last step of held-out data."""

    step: int
    length: int  # of the longest row of all ranks; with a pipeline, of every row
    micro_batches: tuple[MicroBatch, ...]
    windows: tuple[MediaWindow, ...]
    sample_ids: tuple[str, ...]  # in the plan's order, which no layout changes
    sample_tokens: tuple[int, ...]  # of each of them, images included
    row_tokens: tuple[int, ...]  # by row that has samples: the sum of theirs, so padding left out
    padded_tokens: int  # of all rows, padding included, also of rows that fill up a micro-batch
    num_media: int
    num_trained_tokens_local: int  # of this data-parallel rank
    source_names: tuple[str, ...] = ()  # of a mixture
    sample_sources: tuple[int, ...] = ()  # of it, the number of each sample's source
    faults_tolerated: bool = False  # equal on all ranks: whether any window may have faults

    def pinned(self) -> "StepBatch":
        """The same, its images copied to page-locked memory: from there a `non_blocking` copy to the GPU waits for
        nothing. Needs CUDA. Tokens stay: the step cuts each micro-batch, into new memory, before it moves it.

        Hazard: torch keeps page-locked memory for reuse and rounds it up to a power of two; a job needs room on the
        host for two steps' images (four where held-out data is evaluated in training), each up to doubled.
        """
        return replace(self, windows=tuple(replace(w, pixels=w.pixels.pin_memory()) for w in self.windows))

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the global batch, padding left out, images included."""
        return sum(self.row_tokens)

    @property
    def num_padding_tokens(self) -> int:
        """Number of padding tokens of the global batch."""
        return self.padded_tokens - self.num_tokens
