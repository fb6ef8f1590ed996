"""The example that trains from Python: its recipe is valid, and its functions may be called in any order and again."""

import os
from pathlib import Path
from typing import Any

import pytest

from examples import train_in_python
from megatron_vlm.config import load_config, validate
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import MegatronVlmError
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.pool import RankPool
from tests.helpers.ranks.processes import ROOT


def test_its_recipe_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(train_in_python.RECIPE, train_in_python.OVERRIDES)
    validate(config, None, world_size=1)
    assert config.parallel.replica == 1
    assert Path(config.data.path).parent == Path(train_in_python.DATA)


def cells(folder: Path) -> dict[str, Any]:
    """What somebody types into a notebook: trains, asks, trains on, mistypes, trains the same anew. One process."""
    import torch.distributed as dist

    from megatron_vlm.runtime.distributed import teardown

    teardown()  # the pool's group: a notebook has none, and no launcher
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    found: dict[str, Any] = {"groups": []}

    def recipe(steps: int, name: str = "one") -> Config:
        checkpoints = {"directory": str(folder / name), "accept_changes": ["training.steps"]}
        rate = {"name": "constant", "warmup_ratio": 0.0}
        return tiny_recipe(folder, training={"steps": steps}, schedule=rate, checkpoint=checkpoints)

    def note() -> None:
        found["groups"].append(dist.is_initialized())

    found["first"] = train_in_python.run(recipe(2))
    note()
    found["answer"] = train_in_python.ask(folder / "one", str(folder / "images" / "1-0.png"), "Which is near?")
    note()
    wrong = recipe(3).model_copy(update={"data": recipe(3).data.model_copy(update={"template": "vicuna"})})
    try:
        train_in_python.run(wrong)
    except MegatronVlmError as error:
        found["error"] = str(error)
    note()
    found["second"] = train_in_python.run(recipe(4))
    note()
    found["again"] = train_in_python.run(recipe(4, "anew"))
    found["losses"] = train_in_python.losses(recipe(4)), train_in_python.losses(recipe(4, "anew"))
    return found


def test_cells_run_in_any_order_and_leave_nothing(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(1, cells, tmp_path)[0]
    assert found["groups"] == [False] * 4
    assert (found["first"].name, found["second"].name) == ("step_0000002", "step_0000004")
    assert isinstance(found["answer"], str)
    assert "vicuna_v1" in found["error"]
    went_on, anew = found["losses"]
    assert len(anew) == 4 and went_on == anew, "what was run before is seen in a run's losses"
