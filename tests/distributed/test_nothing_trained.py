"""A step of which every sample is left out: a mean over nothing is no loss, and nothing of the run changes by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.training import schedule
from megatron_vlm.training.job import Job, build_job
from tests.helpers.faults import bad_media
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.live_jobs import read_metrics, train_in_pool
from tests.helpers.ranks.pool import RankPool

LAYOUTS = [
    pytest.param(1, {}, {}, id="1"),
    pytest.param(4, {"tensor": 2, "pipeline": 2, "sequence": True}, {}, id="tp2-pp2-sp"),
    pytest.param(2, {"overlap_param_gather": True, "overlap_grad_reduce": True}, {"distributed": True}, id="dp2"),
]


def masked(batch: StepBatch) -> StepBatch:
    """The same step with nothing trained."""
    rows = [replace(m, labels=torch.full_like(m.labels, IGNORE)) for m in batch.micro_batches]
    return replace(batch, micro_batches=tuple(rows))


def states(job: Job) -> list[Tensor]:
    """Copies of this rank's parameters and of all the optimizer holds; parameters are gathered first."""
    for chunk in job.language:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    held = [p for part in job.optimizer.chained_optimizers for g in part.param_groups for p in g["params"]]
    moments = [
        torch.as_tensor(value)
        for part in job.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
    ]
    return [x.detach().clone() for x in [*(p for _, p in job.model.named_parameters()), *held, *moments]]


def steps_around_nothing(recipe: dict[str, Any]) -> tuple[list[Any], bool, list[float | None]]:
    """The masked step's result, whether all states are as before, and the losses of the steps around it, which are
    then made without it, too."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    first, second = list(job.batches(2))
    losses = []

    def step(batch: StepBatch) -> Any:
        schedule.apply(job.optimizer.param_groups, 5, 10, job.config.optimizer, job.config.schedule)
        return job.step(batch)

    losses.append(step(first).loss)
    before = states(job)
    nothing = step(masked(second))
    unchanged = all(torch.equal(a, b) for a, b in zip(before, states(job), strict=True))
    losses.append(step(second).loss)
    return [nothing.loss, nothing.grad_norm, nothing.num_trained_tokens, nothing.updated], unchanged, losses


@pytest.mark.parametrize(("num_ranks", "parallel", "optimizer"), LAYOUTS)
def test_it_changes_nothing(
    ranks: RankPool, tmp_path: Path, num_ranks: int, parallel: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    """Adam with momentum and weight decay would move every weight by a gradient of zero."""
    rates = {"lr": 1e-2, "weight_decay": 0.1}
    recipe = tiny_recipe(tmp_path, parallel=parallel, optimizer={**rates, **optimizer})
    for result, unchanged, losses in ranks.run(num_ranks, steps_around_nothing, recipe.model_dump(mode="json")):
        assert result == [None, None, 0, False]
        assert unchanged
        assert all(isinstance(loss, float) and loss > 0 for loss in losses)


def test_a_run_of_damaged_images_tells_no_loss(ranks: RankPool, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        data={"on_bad_sample": "skip"},
        training={"steps": 2},
        checkpoint={"directory": str(tmp_path / "run")},
        logging={"tensorboard": False, "ranks_every_steps": 0},
    )
    records = json.loads(Path(recipe.data.path).read_text())
    with_images = [record for record in records if record.get("image")]
    for record in with_images:
        images = record["image"] if isinstance(record["image"], list) else [record["image"]]
        for image in images:
            bad_media.truncated(Path(recipe.data.path).parent / image)
    Path(recipe.data.path).write_text(json.dumps(with_images))
    ranks.run(2, train_in_pool, recipe.model_dump(mode="json"))
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] is None and line["grad_norm"] is None and line["updated"] is False
        assert line["trained_tokens"] == 0 and sum(line["blanked"].values()) == line["samples"]
    assert json.loads((tmp_path / "run" / "summary.jsonl").read_text().splitlines()[-1])["loss"] is None
