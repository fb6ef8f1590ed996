"""`logging`: what the run tells while it works."""

from pydantic import Field

from megatron_vlm.config.schema.base import NonNegativeInt, PositiveInt, Section


class LoggingConfig(Section):
    """Reports of a run while it works."""

    every_steps: PositiveInt = Field(default=1, description="Steps from one line on the console to the next.")
    progress: bool = Field(default=True, description="Show progress on the console.")
    curves: bool = Field(default=True, description="Draw the loss curve, a PNG beside the checkpoints.")
    tensorboard: bool = Field(
        default=True, description="Write event files into `tensorboard` in `checkpoint.directory`."
    )
    sample_ids: bool = Field(default=False, description="Write the ids of every step's samples into metrics.jsonl.")
    ranks_every_steps: NonNegativeInt = Field(
        default=50,
        description="Steps from one comparison of the ranks' times by phase and memory to the next; 0: none.",
    )
