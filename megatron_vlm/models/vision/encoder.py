"""The vision encoder: tower and projector as one megatron-core module, a whole replica on every rank.

It is its own DDP chunk over the whole world, so its `config` is a TransformerConfig that knows no tensor or pipeline
parallelism.

Hazard: megatron-core's default `sharded_state_dict` would make every pipeline stage a main replica of these tensors,
and saving would fail ("Invalid access pattern"). Here the replica id is the global rank; checkpoint keys are the global
names, so that a checkpoint does not depend on the selected layer.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vlm.config.megatron import DTYPES
from megatron_vlm.config.schema import Config
from megatron_vlm.models.projectors import build_projector
from megatron_vlm.models.vision.survey import TowerSurvey
from megatron_vlm.models.vision.tower import VisionTower


class VisionEncoder(MegatronModule):
    """pixels -> rows of the language model's width.

    Args:
        survey: the tower's facts.
        config: the recipe: projector, recompute, precision.
        language_size: the language model's hidden size h.
        rank: this rank in the world, for checkpoints.
    """

    def __init__(self, survey: TowerSurvey, config: Config, language_size: int, rank: int) -> None:
        super().__init__(encoder_config(config, survey))
        self.rank = rank
        self.language_size = language_size
        self.tower = VisionTower(survey, recompute=config.training.recompute.vision == "full")
        self.projector = build_projector(
            config.model.projector.type, survey.hidden_size, language_size, config.ops.projector, survey.grid
        )
        self.media_batch = config.training.media_batch
        self.keeps_little = config.training.recompute.vision == "encoder"
        self.to(DTYPES[config.precision.params])

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, H, W] -> [n, tokens_per_image, h]; n may be 0, and then nothing runs."""
        tokens = self.tower.survey.media_spec.tokens_per_image
        if pixels.shape[0] == 0:
            return pixels.new_empty(0, tokens, self.language_size, dtype=self.config.params_dtype)
        if not (self.keeps_little and torch.is_grad_enabled()):
            rows = self._project(pixels)
        elif any(parameter.requires_grad for parameter in self.tower.parameters()):
            rows = checkpoint(self._project, pixels, use_reentrant=False)
        else:  # what the projector reads is about as large as the pixels, and its making is dear
            rows = checkpoint(self.projector, self.tower(pixels), use_reentrant=False)
        assert rows.shape[1] == tokens, f"the projector gives {rows.shape[1]} rows, surveyed {tokens}"
        return rows

    def in_batches(self, pixels: Tensor) -> list[Tensor]:
        """`forward`, `training.media_batch` images at a time. Each result has a graph of its own: joined, they would
        have autograd hold all parameters' gradients of the batches so far, and add them in the parameters' dtype."""
        return [self(batch) for batch in pixels.split(self.media_batch or max(1, len(pixels)))]

    def _project(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.projector(self.tower(pixels))
        return rows

    def global_name(self, name: str) -> str:
        """This module's name of a tensor -> its global one: `vision.<transformers name>` or `projector.<name>`."""
        component, _, rest = name.partition(".")
        return f"vision.{self.tower.hf_name(rest)}" if component == "tower" else name

    def global_names(self) -> dict[str, str]:
        """Local parameter name -> global name."""
        return {name: self.global_name(name) for name, _ in self.named_parameters()}

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Every parameter and persistent buffer, whole, as one replica per global rank (traps B8).

        Keyed by local name for `load_state_dict`; the tensors' checkpoint keys are `prefix` + global name.
        """
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{self.global_name(name)}", tensor, *sharded_offsets, replica_id=(0, 0, self.rank)
            )
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def encoder_config(config: Config, survey: TowerSurvey) -> TransformerConfig:
    """The TransformerConfig by which megatron-core's DDP and optimizer know the encoder: one rank, per-token loss."""
    dtype = DTYPES[config.precision.params]
    return TransformerConfig(
        num_layers=survey.num_kept_layers,
        hidden_size=survey.hidden_size,
        num_attention_heads=1,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
