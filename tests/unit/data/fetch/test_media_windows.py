"""Images shared out over the world: one plan on every rank, every image read once, few foreign texts read."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm.data.batch import MediaWindow, StepBatch
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.fetch.samples import SampleReader
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.media_plan import UNKNOWN
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_recipe

SPEC = MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LAYOUTS = [GridSizes(data=2), GridSizes(tensor=2, data=2), GridSizes(ulysses=2, data=2, pipeline=2), GridSizes(data=4)]


def steps_of(folder: Path, sizes: GridSizes, rank: int, count: int = 2, **sections: Any) -> list[StepBatch]:
    sections["parallel"] = {"media_group": "world", **sections.get("parallel", {})}
    config = tiny_recipe(folder, **sections)
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    return list(build_loader(config, tokenizer, described(config, SPEC), sizes, rank, 0, count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


def check_window(folder: Path, sizes: GridSizes, windows: list[MediaWindow]) -> None:
    """One window as all ranks have it, against the replicas' own plans, which know every text."""
    plans = [window.plan for window in windows]
    assert all(plan.encoder_of == plans[0].encoder_of for plan in plans)
    everything = {}
    for rank, window in enumerate(windows):
        data, own = sizes.coordinates(rank).data, window.plan.items_of(rank)
        theirs = [number for number, item in enumerate(window.plan.items) if item.data == data]
        assert len(window.spans) == len(theirs)
        for number, span in zip(theirs, window.spans, strict=True):
            assert (span.item.start, span.item.row) == (window.plan.items[number].start, window.plan.items[number].row)
            assert everything.setdefault(number, (span.path, span.item.start)) == (span.path, span.item.start)
        known = {number for number, item in enumerate(window.plan.items) if item.start != UNKNOWN}
        assert known == {*theirs, *own}
    assert len(everything) == len(plans[0].items)
    reader, counts = MediaReader(SPEC, "pad"), []
    for rank, window in enumerate(windows):
        own = window.plan.items_of(rank)
        assert [(span.path, span.item.start) for span in window.own_spans] == [everything[number] for number in own]
        assert [span.item for span in window.own_spans] == [window.plan.items[number] for number in own]
        for span, pixels in zip(window.own_spans, window.pixels, strict=True):
            assert torch.equal(pixels, reader.read(folder / span.path, "s"))
        counts.append(len(own))
    assert sum(counts) == len(everything) and max(counts) - min(counts) <= 1  # all images cost the same
    routes = [window.route for window in windows]
    for rank, route in enumerate(routes):
        assert [other.send_splits[rank] for other in routes] == route.recv_splits
        assert [other.grad_send_splits[rank] for other in routes] == route.grad_recv_splits


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_all_ranks_share_all_images(folder: Path, sizes: GridSizes, window: int | None) -> None:
    ranks = [steps_of(folder, sizes, rank, training={"media_window": window}) for rank in range(sizes.world)]
    for batches in zip(*ranks, strict=True):
        for windows in zip(*(batch.windows for batch in batches), strict=True):
            check_window(folder, sizes, list(windows))


def test_packed_rows(folder: Path) -> None:
    """An image's place counts from its row's first token, and not from its sample's."""
    sizes = GridSizes(data=2)
    sections = {"data": {"packing": True}, "training": {"sequence_length": 128, "global_batch_size": 4}}
    ranks = [steps_of(folder, sizes, rank, 1, **sections) for rank in range(2)]
    foreign = 0
    for (batch,), rank in zip(ranks, range(2), strict=True):
        assert max(len(documents.starts) for m in batch.micro_batches for documents in m.documents) > 2
        foreign += sum(span.item.data != rank and span.item.start > 0 for span in batch.windows[0].own_spans)
    assert foreign
    check_window(folder, sizes, [batch.windows[0] for (batch,) in ranks])


def test_only_the_texts_of_its_own_images_are_read_of_others(folder: Path) -> None:
    sizes, read = GridSizes(data=4), Counter[str]()
    original = SampleReader.document

    def counted(source: SampleReader, number: int) -> Any:
        sample, encoded = original(source, number)
        read[sample.id] += 1
        return sample, encoded

    with mock.patch.object(SampleReader, "document", counted):
        (batch,) = steps_of(folder, sizes, 1, 1)
    (window,) = batch.windows
    own_rows = {name for m in batch.micro_batches for name in m.sample_ids}
    needed = {span.sample_id for span in window.own_spans if span.item.data != 1}
    assert read.keys() == own_rows | needed and needed and len(read) < len(batch.sample_ids)
