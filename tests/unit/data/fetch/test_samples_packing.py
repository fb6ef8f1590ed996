"""Steps of `data.packing: samples` on ranks: the plan's samples, each once, on any layout and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_recipe

SPEC = MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LAYOUTS = [GridSizes(data=3), GridSizes(tensor=2, pipeline=2), GridSizes(ulysses=2, ring=2, data=2)]


def recipe(folder: Path, **sections: Any) -> Config:
    return tiny_recipe(folder, data={"packing": "samples", **sections.pop("data", {})}, **sections)


def steps_of(config: Config, sizes: GridSizes, rank: int, start: int, count: int) -> list[StepBatch]:
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    return list(build_loader(config, tokenizer, described(config, SPEC), sizes, rank, start, count))


def trained(batch: StepBatch) -> dict[str, list[int]]:
    """Sample -> its labels, cut out of its row."""
    found: dict[str, list[int]] = {}
    for rows in batch.micro_batches:
        names = iter(rows.sample_ids)
        for row, documents in enumerate(rows.documents):
            for number in range(len(documents.starts)):
                at = documents.interval(number)
                labels = rows.labels[row, at.start : at.stop].tolist()
                assert torch.equal(rows.position_ids[row, at.start : at.stop], torch.arange(len(at)))
                if set(labels) != {IGNORE}:
                    assert found.setdefault(next(names), labels) is labels, "a sample is there twice"
        assert next(names, None) is None
    return found


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("data", [{}, {"group_by_modality_length": True}])
def test_every_layout_trains_the_plans_samples(tmp_path: Path, sizes: GridSizes, data: dict[str, Any]) -> None:
    """Those of rows that are not packed, with the same labels; also where a run goes on with other ranks."""
    alone = steps_of(recipe(tmp_path, data={**data, "packing": "off"}), GridSizes(), 0, 0, 5)
    whole: list[dict[str, list[int]]] = [{} for _ in range(3)]
    config = recipe(tmp_path, data=data, training={"micro_batch_size": 2})
    for data_rank in range(sizes.data):
        batches = steps_of(config, sizes, sizes.replica_ranks(data_rank)[0], 2, 3)
        for step, batch in zip(whole, batches, strict=True):
            assert not step.keys() & trained(batch).keys()
            step |= trained(batch)
    assert whole == [trained(batch) for batch in alone[2:]]
    for one, other in zip(batches, alone[2:], strict=True):
        assert (one.sample_ids, one.sample_tokens) == (other.sample_ids, other.sample_tokens)
        assert (one.num_tokens, one.num_media) == (other.num_tokens, other.num_media)
        assert one.num_padding_tokens >= 0 and len(one.row_tokens) < len(one.sample_ids)


def test_rows_that_fill_up_train_nothing(tmp_path: Path) -> None:
    """Eight samples on eight replicas of two stages leave rows without any; a step trains what it would without."""
    sizes = GridSizes(data=8, pipeline=2)
    batches = [steps_of(recipe(tmp_path, training={"global_batch_size": 5}), sizes, rank, 0, 1)[0] for rank in range(8)]
    empty = [rows for batch in batches for rows in batch.micro_batches if not rows.sample_ids]
    assert empty and all((rows.labels == IGNORE).all() and rows.documents[0].starts == (0, 1) for rows in empty)
    assert len({(len(b.micro_batches), b.micro_batches[0].ids.shape) for b in batches}) == 1
    names = [name for batch in batches for name in trained(batch)]
    assert sorted(names) == sorted(batches[0].sample_ids) and len(names) == 5
    sums = {(batch.padded_tokens, batch.num_tokens, batch.length) for batch in batches}
    ((padded, _, length),) = sums
    assert padded == 8 * length * sum(rows.ids.shape[0] for rows in batches[0].micro_batches)
