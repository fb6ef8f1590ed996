"""A data set of which 5% of the samples have an image that cannot be used trains as if they were not in it.

Under `data.on_bad_sample: skip` the images that are missing, no images or bombs are left out while indexing; those
that only decoding shows to be damaged are blanked and their samples masked. The reference run reads a file that lacks
the former, and leaves the micro-batches of the latter out of its steps. Losses and gradient norms of all steps of an
epoch must be equal, in one process and in layouts; labels that are not masked, on all ranks or on those that did not
read the image themselves, must be found out.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import MicroBatch, StepBatch
from megatron_vlm.training import schedule, step
from megatron_vlm.training.hooks.jsonl import read_lines
from megatron_vlm.training.job import build_job
from tests.helpers.faults import bad_media
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.live_jobs import read_metrics, train_in_pool
from tests.helpers.ranks.pool import RankFailure, RankPool

STEPS = 20  # an epoch: 155 samples, 8 a step
TOLERANCE = 1e-5  # relative


@dataclass
class Run:
    """What a run reports."""

    losses: list[float]
    norms: list[float]
    tokens: list[int]
    blanked: dict[str, int]
    dropped: dict[str, int]


def train(recipe: dict[str, Any], left_out: frozenset[str] = frozenset(), fault: str | None = None) -> Run:
    """Trains an epoch in this rank, through the product's own job, loader and step.

    Args:
        left_out: samples whose micro-batches are taken out of the steps by hand, instead of being masked by them.
        fault: planted.
    """
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    config, run, blanked = job.config, Run([], [], [], {}, {}), Counter()
    with planted(fault):
        for batch in job.batches(STEPS):
            groups = job.optimizer.param_groups
            schedule.apply(groups, batch.step, config.training.steps, config.optimizer, config.schedule)
            result = job.step(without(batch, left_out) if left_out else batch)
            run.losses.append(result.loss)
            run.norms.append(result.grad_norm)
            run.tokens.append(result.num_trained_tokens)
            blanked.update(result.blanked)
    assert job.data is not None
    run.blanked, run.dropped = dict(blanked), job.data.dropped
    return run


def without(batch: StepBatch, samples: frozenset[str]) -> StepBatch:
    """The step without the micro-batches of some samples, each of which is one window's only one."""
    kept = [w for w in batch.windows if batch.micro_batches[w.first_micro_batch].sample_ids[0] not in samples]
    assert all(w.num_micro_batches == 1 and not any(w.faults) for w in kept)
    return replace(batch, windows=tuple(kept), faults_tolerated=False)


def planted(fault: str | None) -> Any:
    """What the test must find out."""
    original = step.all_reduce_

    def not_shared(tensor: torch.Tensor, group: Any, *operation: Any) -> torch.Tensor:
        return tensor if operation else original(tensor, group)

    patches = {
        None: mock.patch.object(step, "FAULTS", step.FAULTS),
        "labels not masked": mock.patch.object(
            MicroBatch, "without_documents", lambda micro_batch, places: micro_batch
        ),
        "faults not shared": mock.patch.object(step, "all_reduce_", not_shared),
    }
    return patches[fault]


@dataclass
class Data:
    """The spoiled data set, its recipe and what it must come to."""

    recipe: dict[str, Any]
    reference: Run

    def layout(self, **parallel: Any) -> dict[str, Any]:
        return {**self.recipe, "parallel": parallel}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Iterator[Data]:
    folder: Path = tmp_path_factory.mktemp("bad_media")
    path, clean, blanked = bad_media.spoil(folder)
    sections = {"data": {"path": str(path), "on_bad_sample": "skip"}, "optimizer": {"lr": 1e-4}}
    recipe = tiny_recipe(folder, **sections).model_dump()
    windows = {**recipe["training"], "media_window": 1}
    reference = {**recipe, "data": {**recipe["data"], "path": str(clean)}, "training": windows}
    yield Data(recipe, ranks.run(1, train, reference, frozenset(blanked))[0])


def compare(runs: list[Run], reference: Run) -> None:
    """Every rank reports the reference's losses and norms, and what was dropped and blanked."""
    for run in runs:
        assert run.dropped == bad_media.DROPPED and run.blanked == bad_media.BLANKED
        for number in range(STEPS):
            for name in ("losses", "norms", "tokens"):
                found, expected = getattr(run, name)[number], getattr(reference, name)[number]
                assert found == pytest.approx(expected, rel=TOLERANCE), f"{name} of step {number} differ"


def test_one_process(ranks: RankPool, data: Data) -> None:
    assert data.reference.dropped == {} and data.reference.blanked == {}
    compare(ranks.run(1, train, data.recipe), data.reference)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        pytest.param(2, {"tensor": 2}, id="tp2", marks=pytest.mark.slow),
        pytest.param(2, {}, id="dp2", marks=pytest.mark.slow),
        pytest.param(2, {"media_group": "world"}, id="dp2-world", marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2, "sequence": True}, id="tp2-pp2-sp", marks=pytest.mark.slow),
    ],
)
def test_layouts(ranks: RankPool, data: Data, num_ranks: int, parallel: dict[str, Any]) -> None:
    compare(ranks.run(num_ranks, train, data.layout(**parallel)), data.reference)


def test_what_a_run_leaves_out_is_on_record(ranks: RankPool, data: Data, tmp_path: Path) -> None:
    steps = {**data.recipe["training"], "steps": STEPS}
    logging = {"tensorboard": False, "ranks_every_steps": 0}
    recipe = {**data.recipe, "training": steps, "logging": logging, "checkpoint": {"directory": str(tmp_path)}}
    ranks.run(2, train_in_pool, recipe)
    (summary,) = read_lines(tmp_path / "summary.jsonl")
    assert summary["samples_left_out"] == bad_media.DROPPED and summary["samples_blanked"] == bad_media.BLANKED
    assert sum((Counter(line["blanked"]) for line in read_metrics(tmp_path)), Counter()) == bad_media.BLANKED


def test_labels_that_are_not_masked_are_found_out(ranks: RankPool, data: Data) -> None:
    with pytest.raises(AssertionError, match="of step .* differ"):
        compare(ranks.run(1, train, data.recipe, frozenset(), "labels not masked"), data.reference)


@pytest.mark.slow
def test_faults_that_are_not_shared_are_found_out(ranks: RankPool, data: Data) -> None:
    """The stage that has the labels does not know then what the other could not read."""
    with pytest.raises(AssertionError) as caught:
        compare(ranks.run(2, train, data.layout(pipeline=2), frozenset(), "faults not shared"), data.reference)
    assert not isinstance(caught.value, RankFailure)
