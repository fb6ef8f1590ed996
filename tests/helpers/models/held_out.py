"""A recipe that evaluates a task while it trains."""

from pathlib import Path
from typing import Any

from tests.helpers.models.tiny import merge, tiny_dataset, tiny_recipe

STEPS = 2
NUM_HELD_OUT = 11  # no multiple of the batch


def recipe_in(directory: Path, **sections: Any) -> dict[str, Any]:
    """A recipe that evaluates a task over files in `directory`."""
    held_out = tiny_dataset(directory, NUM_HELD_OUT, "held_out.json")
    evaluation = {"path": str(held_out), "task": "letters", "max_new_tokens": 6}
    training = {"steps": STEPS, "mode": "train_and_eval", "global_batch_size": 8}
    recipe = {
        "evaluation": evaluation,
        "training": training,
        "optimizer": {"lr": 1e-3, "distributed": True},
        "schedule": {"warmup_ratio": 0.0},
    }
    return tiny_recipe(directory, **merge(recipe, sections)).model_dump(mode="json")
