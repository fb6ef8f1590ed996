"""A whole recipe: its sections, in the order in which they are told.

An extension is imported when the recipe is read, so that what it registers is there before anything is looked up by
name.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from megatron_vlm.config.extensions import IN_PYTHON, import_extension, is_imported
from megatron_vlm.config.schema.base import Section
from megatron_vlm.config.schema.checkpoint import CheckpointConfig
from megatron_vlm.config.schema.data import DataConfig
from megatron_vlm.config.schema.evaluation import EvaluationConfig
from megatron_vlm.config.schema.logging import LoggingConfig
from megatron_vlm.config.schema.loss import LossConfig
from megatron_vlm.config.schema.model import ModelConfig
from megatron_vlm.config.schema.ops import OpsConfig
from megatron_vlm.config.schema.optimizer import OptimizerConfig
from megatron_vlm.config.schema.parallel import ParallelConfig
from megatron_vlm.config.schema.precision import PrecisionConfig
from megatron_vlm.config.schema.runtime import RuntimeConfig
from megatron_vlm.config.schema.schedule import ScheduleConfig
from megatron_vlm.config.schema.training import TrainingConfig
from megatron_vlm.errors import ConfigError


def _import(module: str, info: ValidationInfo) -> str:
    """Imports an extension. One that a checkpoint names is code of anybody: it must be there already, at the user's
    word."""
    is_trusted = info.context is None or info.context["is_trusted"]
    if not is_trusted and not is_imported(module):
        message = "is code, which a checkpoint alone cannot have imported: if you trust it, name it yourself, {how}"
        raise PydanticCustomError("untrusted_extension", message, {"how": f"--extensions {module} ({IN_PYTHON})"})
    try:
        import_extension(module)
    except ConfigError as error:
        message = "must be a module that Python can import, from here or from PYTHONPATH: {reason}"
        raise PydanticCustomError("extension", message, {"reason": str(error)}) from error
    return module


Extension = Annotated[str, AfterValidator(_import)]


class Config(Section):
    """A whole recipe."""

    runtime: RuntimeConfig = RuntimeConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    ops: OpsConfig = OpsConfig()
    extensions: tuple[Extension, ...] = Field(
        default=(),
        description="Python modules of your own that register what the recipe names; every process that reads the "
        "recipe imports them. A checkpoint keeps their names, and whoever loads it names them again (`--extensions`).",
    )

    def used_ops(self) -> dict[str, Any]:
        """`ops` without what does nothing in this recipe."""
        return self.ops.model_dump(exclude={"fp8_quantise"} if self.precision.fp8 is None else set())
