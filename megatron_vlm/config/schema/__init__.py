"""The recipe as one typed, frozen tree (DESIGN D12): a file per section with every key, its type, default and meaning.

Pydantic holds the shape, refuses unknown keys and values of another kind; what depends on several keys, on the world
size or on the model's weights is in `config/rules/`. No torch here: a recipe can be read and checked in milliseconds.
"""

from megatron_vlm.config.schema.base import Section
from megatron_vlm.config.schema.checkpoint import CheckpointConfig
from megatron_vlm.config.schema.data import DataConfig, SourceConfig, VideoConfig
from megatron_vlm.config.schema.evaluation import EvaluationConfig
from megatron_vlm.config.schema.logging import LoggingConfig
from megatron_vlm.config.schema.loss import LossConfig, TimeTokensConfig
from megatron_vlm.config.schema.model import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TrainableConfig,
    VisionConfig,
    VisionCostConfig,
)
from megatron_vlm.config.schema.ops import OpsConfig
from megatron_vlm.config.schema.optimizer import OptimizerConfig
from megatron_vlm.config.schema.parallel import ParallelConfig
from megatron_vlm.config.schema.precision import Fp8ExcludeConfig, PrecisionConfig
from megatron_vlm.config.schema.recipe import Config
from megatron_vlm.config.schema.runtime import RuntimeConfig
from megatron_vlm.config.schema.schedule import ScheduleConfig
from megatron_vlm.config.schema.training import RecomputeConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "Fp8ExcludeConfig",
    "LanguageConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OpsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProjectorConfig",
    "RecomputeConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "Section",
    "SourceConfig",
    "TimeTokensConfig",
    "TrainableConfig",
    "TrainingConfig",
    "VideoConfig",
    "VisionConfig",
    "VisionCostConfig",
]
