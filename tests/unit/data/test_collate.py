"""Rows: shifted labels, padding that is never trained, pictures in their places."""

import torch

from megatron_vlm.data.collate import collate_rows, list_spans
from megatron_vlm.data.conversation import EncodedSample
from megatron_vlm.data.sample import IGNORE, Sample
from megatron_vlm.parallel.media_plan import MediaItem


def sample(name: str, *images: str) -> Sample:
    return Sample(name, (), images, "test")


def test_labels_are_shifted_and_padding_is_ignored() -> None:
    rows = [
        (sample("a"), EncodedSample([5, 6, 7], [IGNORE, 6, 7], [])),
        (sample("b"), EncodedSample([8, 9, 10, 11, 12], [8, IGNORE, IGNORE, 11, 12], [])),
        (sample("c"), EncodedSample([3], [IGNORE], [])),
    ]
    batch = collate_rows(rows, 6)
    assert batch.ids.tolist() == [[5, 6, 7, 0, 0, 0], [8, 9, 10, 11, 12, 0], [3, 0, 0, 0, 0, 0]]
    x = IGNORE
    assert batch.labels.tolist() == [[6, 7, x, x, x, x], [x, x, 11, 12, x, x], [x] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert batch.sample_ids == ("a", "b", "c")
    assert {t.dtype for t in (batch.ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_spans_follow_rows_and_text() -> None:
    rows = [
        (sample("a", "x.png", "y.png"), EncodedSample([0] * 9, [IGNORE] * 9, [1, 5])),
        (sample("b"), EncodedSample([1], [1], [])),
        (sample("c", "z.png"), EncodedSample([0] * 4, [IGNORE] * 4, [0])),
    ]
    spans = list_spans(rows, micro_batch=3, tokens_per_image=4, cost=2.5)
    assert [(span.sample_id, span.path) for span in spans] == [("a", "x.png"), ("a", "y.png"), ("c", "z.png")]
    assert [span.item for span in spans] == [MediaItem(2.5, 4, 3, row, at) for row, at in ((0, 1), (0, 5), (2, 0))]
