"""`evaluation`: held-out data, and the task that is scored on it."""

from pydantic import Field

from megatron_vlm.config.schema.base import NonNegativeInt, PositiveInt, Section


class EvaluationConfig(Section):
    """Held-out data: the loss over all of it, and a task's score where one is named."""

    path: str | tuple[str, ...] | None = Field(default=None, description="The held-out samples, as `data.path`.")
    media_root: str | None = Field(
        default=None,
        description="Folder that paths of images and videos in it are relative to, and may not lead out of. null: "
        "that of `evaluation.path`, which they may.",
    )
    every_steps: NonNegativeInt = Field(
        default=0, description="Steps from one evaluation to the next; 0: only after the last step."
    )
    task: str | None = Field(
        default=None, description="Registered name of a task whose questions are answered by generation and scored."
    )
    max_new_tokens: PositiveInt = Field(default=32, description="Most tokens of an answer.")
