"""The language model's linear layers in FP8 (DESIGN D9): QKV, projection, fc1 and fc2 of the layers that the recipe
does not exclude. Embedding, norms, attention, head, projector and tower stay as they are.

Here by our own GEMMs; Transformer Engine's are in `transformer_engine.py`. mcore's linear layers stay what they are,
and the one function that multiplies, `_forward_impl`, becomes `ops.fp8_linear`. TransformerConfig.fp8 stays None:
without Transformer Engine mcore would take it and quantise nothing.

Weights are ordinary parameters, quantised at every use: optimizer and checkpoints know nothing of FP8. It is for
training only: evaluation and generation compute with the weights as they are exported. What tensor-parallel ranks share
is gathered before it is quantised, so they find the same scale; what is cut over them (weights, heads, feed-forward
channels) has a scale per rank. No scale needs a collective; where the padding begins does, over context ranks, which
therefore all run a chunk in the same mode.

Hazard: amax over padding. Tokens of padding are in the rows whatever is done, with values of their own, so
`counted_tokens` finds those that reach a loss, and each layer is told at every call, the recomputed one included.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ReduceOp

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.ops.fp8 import FORMATS, fp8_linear, fp8_obstacle
from megatron_vlm.ops.labels import IGNORE
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.runtime.collectives import all_reduce_
from megatron_vlm.runtime.device import current_device


class Fp8Layer:
    """State that the linear layers of one decoder layer share: whether to use FP8 now, and which tokens make scales.

    Args:
        layer: mcore's, whose linear layers multiply in FP8 from now on.
        gradient_format: of the gradients of their results.
        backend: of `ops.fp8.quantise`.
    """

    def __init__(self, layer: nn.Module, gradient_format: torch.dtype, backend: str) -> None:
        self.gradient_format, self.backend = gradient_format, backend
        self.active = True
        self.counted: Tensor | None = None
        linears = [part for part in layer.modules() if isinstance(part, (ColumnParallelLinear, RowParallelLinear))]
        if not linears:
            raise ConfigError("precision.fp8: found a decoder layer with no linear layer of megatron-core's in it")
        for linear in linears:
            linear._forward_impl = partial(self.multiply, linear._forward_impl)
        layer.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, layer: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
        """Looks at the context before the layer's forward. The call brings it, so a recomputed one sees its tokens."""
        self.active = layer.training
        self.counted = getattr(keywords.get("packed_seq_params"), "counted", None)

    def multiply(
        self,
        plain: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **options: Any,
    ) -> Tensor:
        """Multiplies in place of mcore's `_forward_impl`, here `plain`: input [s, b, k], [s/tp, b, k] under sequence
        parallelism, times weight [n, k] -> [s, b, n]."""
        if not self.active:
            return plain(
                input=input,
                weight=weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **options,
            )
        if sequence_parallel:  # [s/tp, b, k] -> [s, b, k]; backward: reduce-scatter
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:  # backward: all-reduce
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out = fp8_linear(
            input.flatten(0, 1),  # [s, b, k] -> [s * b, k]
            weight,
            gradient_format=self.gradient_format,
            counted=None if self.counted is None else self.counted.T.flatten(),  # [b, s] -> [s * b]
            backend=self.backend,
        )
        out = out.view(*input.shape[:-1], -1)  # [s * b, n] -> [s, b, n]
        return out if bias is None else out + bias


def quantise_layers(layers: nn.ModuleList, config: Config, num_layers: int) -> list[Fp8Layer]:
    """Has the linear layers of a chunk's decoder layers multiply in FP8, but for those that the recipe excludes.

    Args:
        layers: this chunk's; `layer_number` counts over the whole model, from 1.
        num_layers: of the whole model.

    Raises:
        ConfigError: this device has no FP8.
    """
    if (obstacle := fp8_obstacle(current_device())) is not None:
        raise ConfigError(f"precision.fp8: found {config.precision.fp8}, {obstacle}, or null")
    exclude, gradient_format = config.precision.fp8_exclude, FORMATS[config.precision.fp8_gradients]
    included = range(exclude.first + 1, num_layers - exclude.last + 1)
    return [
        Fp8Layer(layer, gradient_format, config.ops.fp8_quantise) for layer in layers if layer.layer_number in included
    ]


def counted_tokens(labels: Tensor, grid: Grid) -> Tensor:
    """The tokens whose activations make scales: not those whose values no loss depends on.

    Attention is causal, so these are the tokens behind the last trained one of their row, padding among them. Ranks
    that share rows tell each other where that is: one number per row and call.

    Args:
        labels: [b, s] of this rank's tokens.

    Returns:
        [b, s] bool.
    """
    sizes, place = grid.sizes, grid.coordinates
    layout = SequenceLayout(labels.shape[1] * sizes.context, sizes.ring, sizes.ulysses)
    positions = layout.positions(place.ring, place.ulysses).to(labels.device, non_blocking=True)
    last = torch.where(labels != IGNORE, positions, -1).amax(1)  # [b]; -1: none
    if sizes.context > 1:
        all_reduce_(last, grid.context, ReduceOp.MAX)
    return positions[None, :] <= last[:, None]
