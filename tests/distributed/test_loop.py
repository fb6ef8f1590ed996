"""The loop's modes: evaluation comes when it is due and changes nothing; eval alone trains nothing."""

import json
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vlm.checkpoint.directory import checkpoints
from tests.helpers.models.tiny import merge, tiny_dataset, tiny_recipe
from tests.helpers.ranks.live_jobs import read_metrics, train_in_pool
from tests.helpers.ranks.pool import RankFailure, RankPool


def a_recipe(tmp_path: Path, name: str, mode: str, **keys: Any) -> dict[str, Any]:
    return tiny_recipe(
        tmp_path,
        training={"steps": 5, "mode": mode},
        checkpoint={"directory": str(tmp_path / name), "every_steps": 2},
        evaluation={"path": str(tiny_dataset(tmp_path, 5, "held_out.json")), **keys},
        logging={"tensorboard": False, "ranks_every_steps": 0},
    ).model_dump(mode="json")


def evaluations(root: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation."""
    lines = (root / "evaluation.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(("every_steps", "due"), [(2, [2, 4, 5]), pytest.param(0, [5], marks=pytest.mark.slow)])
def test_evaluation_in_training_and_after_it(ranks: RankPool, tmp_path: Path, every_steps: int, due: list[int]) -> None:
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "plain", "train"))
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "both", "train_and_eval", every_steps=every_steps))
    plain, both = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "both")
    assert [line["loss"] for line in both] == [line["loss"] for line in plain]
    found = evaluations(tmp_path / "both")
    assert [step for step, _ in found] == due and len({loss for _, loss in found}) == len(due)
    before = checkpoints(tmp_path / "both")
    assert [path.name for path in before] == ["step_0000005", "step_0000004", "step_0000002"]

    ranks.run(2, train_in_pool, a_recipe(tmp_path, "both", "eval"))
    assert evaluations(tmp_path / "both")[-1] == found[-1]
    assert set(ranks.run(2, count_states, a_recipe(tmp_path, "both", "eval"))) == {(0, 0)}
    assert checkpoints(tmp_path / "both") == before and read_metrics(tmp_path / "both") == both
    if due == [5]:
        (tmp_path / "both" / "evaluation.jsonl").unlink()  # as where the run was killed in its last evaluation
        ranks.run(2, train_in_pool, a_recipe(tmp_path, "both", "train_and_eval"))
        assert evaluations(tmp_path / "both") == found and read_metrics(tmp_path / "both") == both
        with pytest.raises(RankFailure, match=r"training\.mode: found eval with random weights"):
            ranks.run(1, train_in_pool, a_recipe(tmp_path, "nothing trained", "eval"))


@pytest.mark.slow
def test_in_bf16_with_overlap_too(ranks: RankPool, tmp_path: Path) -> None:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    keys = {"precision": {"params": "bf16"}, "parallel": overlap, "optimizer": {"distributed": True}}
    found = []
    for mode in ("train_and_eval", "eval"):
        ranks.run(2, train_in_pool, merge(a_recipe(tmp_path, "run", mode), keys))
        found += evaluations(tmp_path / "run")
        (tmp_path / "run" / "evaluation.jsonl").unlink()
    ((step, loss), (step_again, loss_again)) = found
    assert step == step_again == 5 and loss_again == pytest.approx(loss, rel=1e-6)


def count_states(recipe: dict[str, Any]) -> tuple[int, int]:
    """Inside a rank: numbers of optimizers and of tensors with a gradient in a job."""
    import torch.distributed as dist

    from megatron_vlm.config.schema import Config
    from megatron_vlm.training.job import build_job

    job = build_job(Config.model_validate(recipe), dist.get_world_size(), resumes=True)
    buffers = [buffer for chunk in [*job.language, job.vision] for buffer in chunk.buffers]
    return len(job.optimizer.chained_optimizers), len(buffers)


def stopped_in_evaluation(recipe: dict[str, Any], part: str) -> None:
    """Inside a rank: a run whose last rank is asked to end in the first batch of this part of its evaluation."""
    import torch.distributed as dist

    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.runtime.signals import StopSignals
    from megatron_vlm.training import held_out
    from megatron_vlm.training.step import TrainStep

    signals = StopSignals()
    owner, name = (TrainStep, "evaluate") if part == "losses" else (Assistant, "answer")
    run_part = getattr(owner, name)

    def asked_to_end(*arguments: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            signals.seen = signal.SIGTERM
        return run_part(*arguments)

    with mock.patch.object(owner, name, asked_to_end), mock.patch.object(held_out, "QUESTIONS_AT_A_TIME", 2):
        train_in_pool(recipe, signals)


@pytest.mark.parametrize(
    ("every_steps", "part", "stops_after"),
    [
        (3, "answers", 3),
        pytest.param(3, "losses", 3, marks=pytest.mark.slow),
        pytest.param(2, "losses", 2, marks=pytest.mark.slow),
        pytest.param(0, "answers", 5, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_an_evaluation_is_heard_and_the_evaluation_owed(
    ranks: RankPool, tmp_path: Path, every_steps: int, part: str, stops_after: int
) -> None:
    """After an update that is saved in any case (2 and 5) and one that is not (3). Of the five questions one replica
    has three and the other two: they must leave off together."""
    keys = {"every_steps": every_steps, "task": "exact_match", "max_new_tokens": 2}
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "whole", "train_and_eval", **keys))
    recipe, root = a_recipe(tmp_path, "stopped", "train_and_eval", **keys), tmp_path / "stopped"
    ranks.run(2, stopped_in_evaluation, recipe, part)
    assert checkpoints(root)[0].name == f"step_{stops_after:07d}" and evaluations(root) == []
    ranks.run(2, train_in_pool, recipe)
    assert evaluations(root) == evaluations(tmp_path / "whole")
    assert [x["loss"] for x in read_metrics(root)] == [x["loss"] for x in read_metrics(tmp_path / "whole")]
