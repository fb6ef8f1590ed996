"""What a real run reports: a planted slow rank is named, memory and summary are told, MFU is of all ranks' peak."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.config.schema import Config
from megatron_vlm.planner.flops import model_shape, step_flops
from megatron_vlm.runtime.launch import Launch
from megatron_vlm.training import loop
from megatron_vlm.training.job import Job, build_job
from megatron_vlm.training.reporting.meters import Meter
from tests.helpers.models.tiny import merge, tiny_recipe
from tests.helpers.ranks.pool import RankPool

SLEEP_SECONDS = 0.4
SLOW_RANK = 1


def slow_encode(job: Job) -> None:
    """Rank SLOW_RANK's projector sleeps."""
    if job.grid.rank == SLOW_RANK:
        job.model.vision.projector.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_SECONDS))


def train_with_a_slow_rank(recipe: dict[str, Any]) -> None:
    """The whole loop, one rank slow."""

    def build_slow(*args: Any, **kwargs: Any) -> Job:
        slow_encode(job := build_job(*args, **kwargs))
        return job

    original, loop.build_job = loop.build_job, build_slow
    try:
        loop.train(Config.model_validate(recipe), Launch(rank=dist.get_rank(), world_size=dist.get_world_size()))
    finally:
        loop.build_job = original


def reported(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    base = {
        "checkpoint": {"directory": str(tmp_path / "run"), "async_save": False},
        "training": {"steps": 3},
        "logging": {"ranks_every_steps": 1},
    }
    return tiny_recipe(tmp_path, **merge(base, sections)).model_dump(mode="json")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("parallel", [{}, pytest.param({"tensor": 2}, marks=pytest.mark.slow)], ids=["dp2", "tp2"])
def test_a_slow_rank_is_named(ranks: RankPool, tmp_path: Path, parallel: dict[str, int]) -> None:
    """With tp2 the ranks wait for each other's rows: the exchange is as long as the encoding, which alone tells."""
    ranks.run(2, train_with_a_slow_rank, reported(tmp_path, parallel=parallel))
    lines = read(tmp_path / "run" / "metrics.jsonl")
    last = lines[-1]["ranks"]
    assert (last["straggler"]["rank"], last["straggler"]["phase"]) == (SLOW_RANK, "encode")
    assert last["phases"]["encode"]["max"] >= SLEEP_SECONDS > last["straggler"]["median_seconds"]
    if parallel:
        assert last["phases"]["exchange"]["max"] > 0.75 * SLEEP_SECONDS
    (summary,) = read(tmp_path / "run" / "summary.jsonl")
    assert summary["steps"] == 3 and summary["tokens"] == sum(line["tokens"] for line in lines)
    assert summary["peak_memory_bytes"] > 2**20 and (tmp_path / "run" / "tensorboard").exists()


def mfu_of_one_step(recipe: dict[str, Any]) -> dict[str, float]:
    """A step's report beside the same worked out again."""
    config = Config.model_validate(recipe)
    job = build_job(config, torch.distributed.get_world_size())
    meter = Meter(job)
    (batch,) = meter.timed(job.batches(1))
    report = meter.report(batch, job.step(batch, exact_times=meter.compares(batch)))
    shape = model_shape(job.model.vision, job.model.language[0].spec, config.model)
    flops = step_flops(shape, batch.sample_tokens, report.trained_tokens, batch.num_media)
    return {
        "flops": flops,
        "by tflops": report.tflops_per_rank * 1e12 * report.seconds * dist.get_world_size(),
        "by mfu": report.mfu * report.seconds * meter.peak.flops_per_second,
        "peak": meter.peak.flops_per_second,
        "compared": report.ranks is not None,
        "tokens": report.tokens_per_second * report.seconds,
        "tokens of rows": sum(batch.row_tokens),
    }


def test_the_flops_of_a_step_do_not_depend_on_the_layout(ranks: RankPool, tmp_path: Path) -> None:
    (alone,) = ranks.run(1, mfu_of_one_step, reported(tmp_path))
    split = ranks.run(2, mfu_of_one_step, reported(tmp_path, parallel={"pipeline": 2}))
    for found in (alone, *split):
        assert found["by tflops"] == pytest.approx(found["flops"]) == pytest.approx(found["by mfu"])
        assert found["flops"] == alone["flops"] and found["compared"]
        assert found["tokens"] == pytest.approx(found["tokens of rows"])
    assert split[0]["peak"] == split[1]["peak"], "one peak, of both ranks"
