"""The loop's modes: evaluation comes when it is due and changes nothing; eval alone trains nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.directory import checkpoints
from tests.helpers.live_jobs import read_metrics, train_in_pool
from tests.helpers.ranks import RankFailure, RankPool
from tests.helpers.tiny import tiny_dataset, tiny_recipe


def a_recipe(tmp_path: Path, name: str, mode: str, **keys: Any) -> dict[str, Any]:
    return tiny_recipe(
        tmp_path,
        training={"steps": 5, "mode": mode},
        checkpoint={"directory": str(tmp_path / name), "every_steps": 2},
        evaluation={"path": str(tiny_dataset(tmp_path, 6, "held_out.json")), **keys},
        logging={"tensorboard": False, "ranks_every_steps": 0},
    ).model_dump(mode="json")


def evaluations(root: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation."""
    lines = (root / "evaluation.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(("every_steps", "due"), [(2, [2, 4, 5]), (0, [5])])
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
    assert checkpoints(tmp_path / "both") == before and read_metrics(tmp_path / "both") == both
    if due == [5]:
        (tmp_path / "both" / "evaluation.jsonl").unlink()  # as where the run was killed in its last evaluation
        ranks.run(2, train_in_pool, a_recipe(tmp_path, "both", "train_and_eval"))
        assert evaluations(tmp_path / "both") == found and read_metrics(tmp_path / "both") == both
        with pytest.raises(RankFailure, match=r"training\.mode: found eval with random weights"):
            ranks.run(1, train_in_pool, a_recipe(tmp_path, "nothing trained", "eval"))
