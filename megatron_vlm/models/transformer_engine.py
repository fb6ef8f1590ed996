"""The language model's linear layers as Transformer Engine's, for its FP8 recipes (DESIGN D9).

mcore's wrappers of them take the place of mcore's own in a layer's spec; TransformerConfig.fp8 says by which recipe,
and mcore enters it around each layer. Norms and the core attention stay ours. Three things are changed:

- tokens are filled up with zeros to what the GEMMs need, and cut off again: Transformer Engine refuses other numbers of
  them, and zeros are the largest of nothing, so they are in no scale, whatever block they stand in;
- outside training FP8 is off, as in our own (`fp8.py`);
- nothing of it is in checkpoints, so that one loads wherever any other does. With the recipe `delayed` a resumed run
  therefore starts with scales of 1 and a new history of them.

Hazard: padding that the data brings is not told apart here: it takes part in scales.
"""

import copy
from math import gcd
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.nn import functional

from megatron_vlm.errors import ConfigError

TOKENS = {"tensorwise": 16, "delayed": 16, "blockwise": 128}  # a GEMM's number of tokens is a multiple of this


class PaddedTokens(nn.Module):
    """A tensor-parallel linear layer with its tokens filled up with zeros, FP8 in training only, no state of its own
    in checkpoints.

    Under sequence parallelism each rank's part of the sequence is filled up by itself.
    """

    config: Any
    gathers: bool  # its input over the ranks, under sequence parallelism; else it cuts its output over them

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """mcore's: [s, b, k] (column: [s/tp, b, k] under sequence parallelism) -> the product and the bias to add."""
        config = self.config
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        before, after = (1, ranks) if self.gathers else (ranks, 1)  # parts of the sequence in what comes and goes
        missing = missing_tokens(x.shape[0] // before, x.shape[1], TOKENS[config.fp8_recipe])
        out, bias = self.multiply(fill_up(x, before, missing))
        return cut_off(out, after, missing), bias

    def multiply(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The linear layer's own forward."""
        return super().forward(x)

    def get_extra_state(self) -> None:
        """Nothing, as mcore's own linear layers keep."""

    def set_extra_state(self, state: Any) -> None:
        """Ignored."""


def missing_tokens(num_tokens: int, num_rows: int, multiple: int) -> int:
    """Tokens that each row of `num_rows` rows lacks, so that tokens times rows are a multiple of `multiple`."""
    return -num_tokens % (multiple // gcd(multiple, num_rows))


def fill_up(x: Tensor, parts: int, missing: int) -> Tensor:
    """[parts * s, b, h] -> [parts * (s + missing), b, h], zeros behind each part."""
    if not missing:
        return x
    return functional.pad(x.unflatten(0, (parts, -1)), (0, 0, 0, 0, 0, missing)).flatten(0, 1)


def cut_off(x: Tensor, parts: int, missing: int) -> Tensor:
    """[parts * (s + missing), b, h] -> [parts * s, b, h], what `fill_up` put in left out."""
    if not missing:
        return x
    return x.unflatten(0, (parts, -1))[:, :-missing].flatten(0, 1)


def with_transformer_engine(layer: ModuleSpec) -> ModuleSpec:
    """A layer's spec with Transformer Engine's linear layers in the place of mcore's.

    Raises:
        ConfigError: a linear layer that is neither of mcore's two.
    """
    replacements = _linear_layers()
    layer = copy.deepcopy(layer)
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    for parts, name in (
        (attention, "linear_qkv"),
        (attention, "linear_proj"),
        (mlp, "linear_fc1"),
        (mlp, "linear_fc2"),
    ):
        found = getattr(parts, name, None)
        if found not in replacements:
            raise ConfigError(f"precision.fp8: the decoder layer's {name} is {found}, needs megatron-core's own")
        setattr(parts, name, replacements[found])
    return layer


def _linear_layers() -> dict[Any, type]:
    """mcore's own linear layer -> Transformer Engine's."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    from transformer_engine.pytorch import fp8_autocast  # type: ignore[import-not-found]

    class Training(PaddedTokens):
        """FP8 only while the module trains."""

        def multiply(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.training:
                return super().multiply(x)
            with fp8_autocast(enabled=False):
                return super().multiply(x)

    class Column(Training, TEColumnParallelLinear):
        """Cut over the outputs."""

        gathers = True

    class Row(Training, TERowParallelLinear):
        """Cut over the inputs."""

        gathers = False

    return {ColumnParallelLinear: Column, RowParallelLinear: Row}
