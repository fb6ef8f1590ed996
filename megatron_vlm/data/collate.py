"""From encoded samples to the rows of a micro-batch and the pictures of a window.

Labels are shifted here, over whole rows, before any rank cuts them: shifted afterwards, the token at each cut would
lose its label. Padding stands at the end of a row, where a causal model cannot see it from any token that counts.

b rows; s tokens of every row.
"""

from collections.abc import Sequence

import torch

from megatron_vlm.data.batch import MediaSpan, MicroBatch
from megatron_vlm.data.conversation import PLACEHOLDER_ID, EncodedSample
from megatron_vlm.data.sample import IGNORE, Sample
from megatron_vlm.parallel.media_plan import MediaItem

Row = tuple[Sample, EncodedSample]


def collate_rows(rows: Sequence[Row], length: int) -> MicroBatch:
    """b samples -> a micro-batch of [b, length]."""
    ids = torch.full((len(rows), length), PLACEHOLDER_ID)
    labels = torch.full((len(rows), length), IGNORE)
    for number, (_, encoded) in enumerate(rows):
        num_tokens = len(encoded.ids)
        assert num_tokens <= length, f"{num_tokens} tokens in a row of {length}"
        ids[number, :num_tokens] = torch.tensor(encoded.ids)
        labels[number, : num_tokens - 1] = torch.tensor(encoded.labels[1:])  # token i answers for token i + 1
    position_ids = torch.arange(length).expand(len(rows), length).contiguous()
    return MicroBatch(ids, labels, position_ids, tuple(sample.id for sample, _ in rows))


def list_spans(rows: Sequence[Row], micro_batch: int, tokens_per_image: int, cost: float) -> list[MediaSpan]:
    """The pictures of one micro-batch, in row and text order.

    Args:
        micro_batch: its index in the step.
        cost: of encoding one picture.
    """
    return [
        MediaSpan(sample.id, path, MediaItem(cost, tokens_per_image, micro_batch, row, start))
        for row, (sample, encoded) in enumerate(rows)
        for path, start in zip(sample.images, encoded.image_starts, strict=True)
    ]
