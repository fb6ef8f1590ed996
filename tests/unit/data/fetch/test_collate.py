"""Rows: shifted labels, padding that is never trained, images in their places."""

import random

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_vlm.data.batch import MicroBatch
from megatron_vlm.data.fetch.collate import Document, collate_rows, list_spans
from megatron_vlm.data.sample import IGNORE, Sample
from megatron_vlm.data.text.conversation import EncodedSample
from megatron_vlm.parallel.layout import Documents
from megatron_vlm.parallel.media_plan import MediaItem

X = IGNORE


def sample(name: str, *images: str) -> Sample:
    return Sample(name, (), images, "test")


def test_labels_are_shifted_and_padding_is_ignored() -> None:
    rows = [
        [(sample("a"), EncodedSample([5, 6, 7], [IGNORE, 6, 7], []))],
        [(sample("b"), EncodedSample([8, 9, 10, 11, 12], [8, IGNORE, IGNORE, 11, 12], []))],
        [(sample("c"), EncodedSample([3], [IGNORE], []))],
    ]
    batch = collate_rows(rows, 6)
    assert batch.ids.tolist() == [[5, 6, 7, 0, 0, 0], [8, 9, 10, 11, 12, 0], [3, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, X, X, X, X], [X, X, 11, 12, X, X], [X] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert batch.sample_ids == ("a", "b", "c")
    assert batch.documents == (Documents.whole(6),) * 3
    assert {t.dtype for t in (batch.ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_spans_follow_rows_documents_and_text() -> None:
    rows = [
        [
            (sample("a", "x.png", "y.png"), EncodedSample([0] * 9, [IGNORE] * 9, [1, 5])),
            (sample("d", "w.png"), EncodedSample([0] * 5, [IGNORE] * 5, [1])),
        ],
        [(sample("b"), EncodedSample([1], [1], []))],
        [(sample("c", "z.png", "cut.png"), EncodedSample([0] * 4, [IGNORE] * 4, [0], num_cut=9))],
    ]
    spans = list_spans(rows, micro_batch=3, tokens_per_image=4, cost=2.5)
    assert [(span.sample_id, span.path) for span in spans] == [
        *(("a", "x.png"), ("a", "y.png"), ("d", "w.png"), ("c", "z.png"))
    ]
    places = ((0, 1), (0, 5), (0, 10), (2, 0))
    assert [span.item for span in spans] == [MediaItem(2.5, 4, 3, row, at) for row, at in places]


def packed() -> MicroBatch:
    """A row with padding, a full one, and one of a single document."""
    one = (sample("one"), EncodedSample([3], [3], []))
    two = (sample("two"), EncodedSample([4, 5], [4, 5], []))
    three = (sample("three"), EncodedSample([6, 7, 8], [X, 7, 8], []))
    return collate_rows([[one, two, three], [two, three, two], [three]], 7, packed=True)


def test_a_packed_row_restarts_in_every_document_and_its_padding() -> None:
    batch = packed()
    assert batch.ids.tolist() == [[3, 4, 5, 6, 7, 8, 0], [4, 5, 6, 7, 8, 4, 5], [6, 7, 8, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[X, 5, X, 7, 8, X, X], [5, X, 7, 8, X, 5, X], [7, 8, X, X, X, X, X]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.documents == (
        Documents((0, 1, 3, 6), 7, padded=True),
        Documents((0, 2, 5), 7),
        Documents((0, 3), 7, padded=True),
    )
    assert batch.sample_ids == ("one", "two", "three", "two", "three", "two", "three")
    assert batch.to(torch.device("cpu")).documents == batch.documents


def test_one_document_can_be_left_out() -> None:
    """Every other of the row keeps its labels."""
    batch = packed()
    starts = {(row, at): batch.document(row, at).start for row, at in ((0, 0), (0, 2), (1, 6), (2, 1), (2, 6))}
    assert list(starts.values()) == [0, 1, 5, 0, 3]
    blanked = batch.without_documents([(0, 4), (1, 0), (1, 6)])
    assert blanked.labels.tolist() == [[X, 5, X, X, X, X, X], [X, X, 7, 8, X, X, X], [7, 8, X, X, X, X, X]]
    assert batch.labels[0, 3] == 7, "the batch itself is as it was"
    assert torch.equal(batch.without([1]).labels[1], torch.full((7,), X))


class Written(TorchFunctionMode):
    """Counts the elements that are assigned to parts of tensors."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            self.elements += args[2].numel()
        return func(*args, **(kwargs or {}))


def test_many_documents_cost_no_more_than_one() -> None:
    """Each element is written once: not the rest of the row for every document."""
    length = 4096
    rows = [[(sample(str(number)), EncodedSample([1] * 4, [1] * 4, [])) for number in range(length // 4)]]
    with Written() as written:
        batch = collate_rows(rows, length, packed=True)
    assert len(batch.documents[0].starts) == length // 4
    assert written.elements <= 3 * length, "ids, labels and position ids"


@pytest.mark.parametrize("seed", range(20))
def test_packed_rows_are_those_of_a_token_by_token_construction(seed: int) -> None:
    draw = random.Random(seed)
    rows: list[list[Document]] = []
    for number in range(3):
        lengths = [draw.choice((1, 2, 3, 7, 12)) for _ in range(draw.randint(1, 5))]
        ids = [[draw.randint(1, 90) for _ in range(length)] for length in lengths]
        labels = [[draw.choice((IGNORE, id_)) for id_ in row] for row in ids]
        rows.append(
            [
                (sample(f"{number}-{k}"), EncodedSample(*both, []))
                for k, both in enumerate(zip(ids, labels, strict=True))
            ]
        )
    length = max(sum(len(encoded.ids) for _, encoded in row) for row in rows) + draw.choice((0, 1, 5))
    batch = collate_rows(rows, length, packed=True)
    for number, row in enumerate(rows):
        tokens = []  # id, label, position, of each token
        for _, encoded in row:
            for at, id_ in enumerate(encoded.ids):
                predicted = encoded.labels[at + 1] if at + 1 < len(encoded.ids) else IGNORE
                tokens.append((id_, predicted, at))
        padding = [(0, IGNORE, at) for at in range(length - len(tokens))]
        found = zip(*(t[number].tolist() for t in (batch.ids, batch.labels, batch.position_ids)), strict=True)
        assert list(found) == tokens + padding
        restarts = tuple(at for at, (_, _, position) in enumerate(tokens + padding) if position == 0)
        assert batch.documents[number].starts == restarts
