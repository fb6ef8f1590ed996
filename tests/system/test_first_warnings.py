"""What a run is warned of when it starts: once, by name, and only where it is so."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import to_yaml
from megatron_vlm.training import loop
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.live_jobs import START_SECONDS, TRAIN, LiveJob, read_metrics, wait_for

FROZEN = "model.train.vision false: all parameters of model.vision start from random weights and keep them"
UNSAVED = "checkpoint.every_steps is 0: nothing is saved before the last step"


def said(tmp_path: Path, name: str, num_ranks: int, *overrides: str, **sections: Any) -> str:
    """What a run tells until it has made its first steps, or to its end where it has no more."""
    checkpoint = {"directory": str(tmp_path / name), **sections.pop("checkpoint", {})}
    recipe = tiny_recipe(tmp_path, checkpoint=checkpoint, **sections)
    (tmp_path / f"{name}.yaml").write_text(to_yaml(recipe))
    with LiveJob(tmp_path / f"logs of {name}", [TRAIN, tmp_path / f"{name}.yaml", *overrides], num_ranks) as job:
        if recipe.training.steps == 2:
            job.process.wait(START_SECONDS)
        wait_for("two steps", lambda: len(read_metrics(tmp_path / name)) >= 2 or job.process.poll() is not None)
        assert job.read("stderr.log") == ""
        return job.stdout


@pytest.mark.slow
def test_a_frozen_tower_of_random_weights_and_a_long_run_without_checkpoints(tmp_path: Path) -> None:
    frozen = {"train": {"vision": False}}
    told = said(tmp_path, "frozen", 2, model=frozen, training={"steps": 501})
    assert told.count(FROZEN) == 1 and told.count(UNSAVED) == 1 and told.count("WARNING") == 2
    first = said(tmp_path, "first", 1, training={"steps": 2})
    assert UNSAVED in first and "WARNING" not in first  # short, and everything trains
    load = [f"checkpoint.load={tmp_path / 'first'}", "checkpoint.load_states=model"]
    second = said(tmp_path, "second", 1, *load, model=frozen, training={"steps": 600}, checkpoint={"every_steps": 300})
    assert "weights from" in second and "WARNING" not in second


@pytest.mark.parametrize(
    ("num_steps", "rank", "level"), [(500, 0, "info"), (500, 1, "info"), (501, 0, "warning"), (501, 1, None)]
)
def test_how_much_a_run_without_checkpoints_may_lose_is_told(num_steps, rank, level, monkeypatch):
    told = []
    for name in ("info", "warning"):
        monkeypatch.setattr(loop.logger, name, lambda text, *parts, name=name: told.append((name, text % parts)))
    loop.tell_unsaved(num_steps, rank)
    assert [name for name, _ in told] == ([] if level is None else [level])
    assert all(UNSAVED in text for _, text in told)
    assert all(
        ("501 steps" in text and "set checkpoint.every_steps" in text) == (level == "warning") for _, text in told
    )
