"""`checkpoint`: where checkpoints go, and what a run starts from."""

from typing import Literal

from pydantic import Field

from megatron_vlm.config.schema.base import NonNegativeInt, PositiveInt, Section


class CheckpointConfig(Section):
    """Checkpoints that a run writes, and the one that it starts from."""

    directory: str = Field(description="Folder of the run: its checkpoints, its recipe and its metrics.")
    every_steps: NonNegativeInt = Field(
        default=0, description="Steps from one checkpoint to the next; 0: only after the last step."
    )
    keep: PositiveInt | None = Field(
        default=None, description="Number of newest checkpoints that are kept. null: all of them."
    )
    async_save: bool = Field(
        default=True, description="Have a process beside each rank write checkpoints while training goes on."
    )
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: go on from the newest good checkpoint in `checkpoint.directory`; never: refuse to start "
        "where there is one.",
    )
    accept_changes: tuple[str, ...] = Field(
        default=(), description="Keys or sections of the recipe that may differ from the checkpoint's on resume."
    )
    load: str | None = Field(
        default=None,
        description="Where a run starts that has nothing to resume: a checkpoint, or a directory of them, of which "
        "the newest is taken.",
    )
    load_states: Literal["all", "model"] = Field(
        default="all",
        description="What is taken from `checkpoint.load`. all: go on with that run; model: the weights alone, for a "
        "new training phase.",
    )
