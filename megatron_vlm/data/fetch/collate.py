"""Encoded samples made the rows of a micro-batch and the images of a window.

Labels are shifted here, over whole documents, before any rank cuts them: shifted afterwards, the token at each cut
would lose its label. The last token of a document predicts nothing. Padding stands at the end of a row, where a causal
model cannot see it from any token that counts.

b rows; s tokens of every row.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from megatron_vlm.data.batch import MediaSpan, MicroBatch
from megatron_vlm.data.sample import IGNORE, Sample
from megatron_vlm.data.text.conversation import PLACEHOLDER_ID, EncodedSample
from megatron_vlm.parallel.layout import Documents
from megatron_vlm.parallel.media_plan import MediaItem

Document = tuple[Sample, EncodedSample]


def collate_rows(rows: Sequence[Sequence[Document]], length: int, packed: bool = False) -> MicroBatch:
    """b rows -> a micro-batch of [b, length].

    Args:
        rows: the samples of each, in order.
        packed: isolates the samples, and the padding behind them, from each other; else a row is one sample, and one
            document with its padding. A row may then have no sample: it is a document of one token, since attention
            takes no row without any, and padding.
    """
    ids = torch.full((len(rows), length), PLACEHOLDER_ID)
    labels = torch.full((len(rows), length), IGNORE)
    position_ids, places = torch.empty_like(ids), torch.arange(length)
    documents = []
    for number, row in enumerate(rows):
        assert packed or len(row) == 1, f"{len(row)} samples in a row that is not packed"
        lengths = [len(encoded.ids) for _, encoded in row]
        assert sum(lengths) <= length, f"{sum(lengths)} tokens in a row of {length}"
        documents.append(Documents.packed(lengths or [1], length) if packed else Documents.whole(length))
        for start, stop in pairwise((*documents[-1].starts, length)):
            position_ids[number, start:stop] = places[: stop - start]
        for start, (_, encoded) in zip(accumulate(lengths, initial=0), row, strict=False):
            stop = start + len(encoded.ids)
            ids[number, start:stop] = torch.tensor(encoded.ids)
            labels[number, start : stop - 1] = torch.tensor(encoded.labels[1:])  # token i answers for token i + 1
    sample_ids = tuple(sample.id for row in rows for sample, _ in row)
    return MicroBatch(ids, labels, position_ids, tuple(documents), sample_ids)


def with_sources(batch: MicroBatch, rows: Sequence[Sequence[Document]], num_sources: int) -> MicroBatch:
    """The micro-batch of these rows with the source of each token; padding has that of number 0, and no label."""
    sources = torch.zeros_like(batch.ids)
    for number, row in enumerate(rows):
        start = 0
        for sample, encoded in row:
            sources[number, start : start + len(encoded.ids)] = sample.source
            start += len(encoded.ids)
    return replace(batch, sources=sources, num_sources=num_sources)


def list_spans(
    rows: Sequence[Sequence[Document]], micro_batch: int, tokens_per_image: int, cost: float, length: int | None = None
) -> list[MediaSpan]:
    """The images of one micro-batch, in row, document and text order.

    Args:
        micro_batch: its index in the step.
        cost: of encoding one image.
        length: tokens of the rows, where those of the step differ.
    """
    spans = []
    for number, row in enumerate(rows):
        first = 0  # token of the document
        for sample, encoded in row:
            for path, start in zip(sample.images[: len(encoded.image_starts)], encoded.image_starts, strict=True):
                item = MediaItem(cost, tokens_per_image, micro_batch, number, first + start, length=length)
                spans.append(MediaSpan(sample.id, path, item, sample.source))
            first += len(encoded.ids)
    return spans
