"""Trains a small model and asks it from Python, in one process: a script, or the cells of a notebook.

    python examples/quickstart/make_data.py runs/quickstart/data
    python examples/train_in_python.py

Every function ends the process group it makes, so they may be called in any order, and again: `run` goes on where its
last checkpoint is (to more steps with `checkpoint.accept_changes=[training.steps]`). What stays is the process's device
(on a CPU, torch.cuda leads there from then on) and the state of the random generators. Several ranks need a launcher,
megatron-vlm launch.
"""

import json
from pathlib import Path

import megatron_vlm
from megatron_vlm.config import load_config
from megatron_vlm.config.schema import Config
from megatron_vlm.runtime.device import prepare
from megatron_vlm.runtime.distributed import Launch, init_world, teardown
from megatron_vlm.runtime.logging import quiet_libraries

DATA, CHECKPOINTS = "runs/quickstart/data", "runs/train_in_python"
RECIPE = "examples/recipes/quickstart_phase1.yaml"
OVERRIDES = ["runtime.device=auto", "parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false",
             f"checkpoint.directory={CHECKPOINTS}", "training.steps=400", "data.num_workers=0"]  # fmt: skip


def run(config: Config) -> Path | None:
    """Trains a recipe to its last step; returns the last checkpoint. Raises MegatronVlmError for what you can mend."""
    from megatron_vlm.training.loop import train  # with torch, once the libraries were told to be quiet

    try:
        init_world(Launch(), prepare(config.runtime.device), config.runtime.timeout_seconds)  # one rank: this process
        return train(config, Launch())
    finally:
        teardown()


def losses(config: Config) -> list[float]:
    """The loss of every step so far, as the run wrote them down."""
    lines = Path(config.checkpoint.directory, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def ask(checkpoint: str | Path, *prompt: str) -> str:
    """The model's answer to a prompt of image files and text. `checkpoint`: one, or the folder of a run's."""
    try:
        return megatron_vlm.load(str(checkpoint)).generate(list(prompt))
    finally:
        teardown()


if __name__ == "__main__":
    quiet_libraries()
    config = load_config(RECIPE, OVERRIDES)
    run(config)
    print("loss, every 50 steps:", " ".join(f"{loss:.2f}" for loss in losses(config)[::50]))
    print("What digit is this?", ask(CHECKPOINTS, f"{DATA}/images/0000.png", "What digit is this?"))
