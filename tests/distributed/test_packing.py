"""Packed steps over real ranks: each sample on one data-parallel rank, equal on its replica, once per epoch; and a run
that goes on with another number of ranks trains exactly what the first one would have."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.pool import RankPool

SPEC = MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
Documents = dict[str, tuple[list[int], list[int], list[int]]]  # sample -> ids, labels, positions


def packed_recipe(folder: Path) -> Config:
    training = {"sequence_length": 128, "global_batch_size": 4}
    return tiny_recipe(folder, data={"packing": True, "num_workers": 0}, training=training)


def read_steps(config: Config, sizes: GridSizes, start: int, count: int) -> list[Documents]:
    """The global batches as this job's ranks have them together, checked on every rank."""
    from megatron_vlm.data.fetch.loader import build_loader
    from megatron_vlm.data.sample import IGNORE
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.parallel.groups import build_grid
    from megatron_vlm.runtime.collectives import all_gather_objects

    grid = build_grid(sizes)
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    steps = []
    for batch in build_loader(config, tokenizer, described(config, SPEC), sizes, grid.rank, start, count):
        own: Documents = {}
        for micro_batch in batch.micro_batches:
            names = iter(micro_batch.sample_ids)
            for row, documents in enumerate(micro_batch.documents):
                tensors = (micro_batch.ids[row], micro_batch.labels[row], micro_batch.position_ids[row])
                for number in range(len(documents.starts)):
                    at = documents.interval(number)
                    ids, labels, positions = (tensor[at.start : at.stop].tolist() for tensor in tensors)
                    assert positions == list(range(len(ids))) and labels[-1] == IGNORE
                    if any(ids):  # else padding, which stands last
                        own[next(names)] = ids, labels, positions
                    else:
                        assert at.stop == documents.length and set(labels) == {IGNORE}
        trained = sum(label != IGNORE for _, labels, _ in own.values() for label in labels)
        assert batch.num_trained_tokens_local == trained
        everyone = all_gather_objects(own, grid.world)
        whole: Documents = {}
        for data in range(sizes.data):
            first, *others = (everyone[rank] for rank in sizes.replica_ranks(data))
            assert all(other == first for other in others) and not whole.keys() & first.keys()
            whole |= first
        assert sorted(whole) == sorted(batch.sample_ids)
        counts = torch.tensor([trained / sizes.replica, batch.num_tokens / sizes.world])
        torch.distributed.all_reduce(counts)
        assert counts.tolist() == pytest.approx(
            [
                sum(label != IGNORE for _, labels, _ in whole.values() for label in labels),
                sum(len(ids) for ids, _, _ in whole.values()),
            ]
        )
        steps.append(whole)
    return steps


def test_another_number_of_ranks_goes_on_with_the_same_samples(ranks: RankPool, tmp_path: Path) -> None:
    config = packed_recipe(tmp_path)
    (alone,) = ranks.run(1, read_steps, config, GridSizes(), 0, 8)
    before = ranks.run(4, read_steps, config, GridSizes(data=4), 0, 3)
    after = ranks.run(4, read_steps, config, GridSizes(data=2, ring=2), 3, 3)
    last = ranks.run(2, read_steps, config, GridSizes(tensor=2), 6, 2)
    for run, wanted in ((before, alone[:3]), (after, alone[3:6]), (last, alone[6:])):
        assert all(steps == wanted for steps in run)
    seen = Counter(name for step in alone for name in step)
    assert len(seen) == 24 and max(seen.values()) - min(seen.values()) <= 1 < max(seen.values())
