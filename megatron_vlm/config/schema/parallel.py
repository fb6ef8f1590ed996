"""`parallel`: how the ranks share the work."""

from typing import Literal

from pydantic import Field

from megatron_vlm.config.schema.base import PositiveInt, Section


class ParallelConfig(Section):
    """Division of the work among the ranks; data parallelism is what is left of the world."""

    tensor: PositiveInt = Field(default=1, description="Ranks that share each layer: its heads and channels.")
    pipeline: PositiveInt = Field(default=1, description="Ranks that share the layers, as stages of a pipeline.")
    virtual_pipeline: PositiveInt = Field(
        default=1, description="Model chunks on each pipeline rank; more than 1 is the interleaved schedule."
    )
    sequence: bool = Field(
        default=False,
        description="Cut sequences over the tensor ranks where a layer is not split (Megatron sequence parallelism).",
    )
    ulysses: PositiveInt = Field(
        default=1, description="Ranks that share a sequence and exchange it for attention heads."
    )
    ring: PositiveInt = Field(
        default=1, description="Ranks that share a sequence and send each other keys and values in attention."
    )
    context: PositiveInt | None = Field(
        default=None,
        description="Ranks that share a sequence, whose split into `ulysses` and `ring` is chosen by heads and nodes.",
    )
    ring_mode: Literal["p2p", "all_gather"] = Field(
        default="p2p",
        description="How keys and values travel. p2p: around the ring, while attention is computed; all_gather: all "
        "at once, for short rings.",
    )
    media_group: Literal["replica", "world"] = Field(
        default="replica", description="Ranks that share the encoding of their images and frames."
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="Reduce gradients over the data-parallel ranks during the backward pass."
    )
    overlap_param_gather: bool = Field(
        default=False, description="Gather updated parameters during the next forward pass."
    )

    @property
    def replica(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor * self.pipeline * (self.context or self.ulysses * self.ring)
