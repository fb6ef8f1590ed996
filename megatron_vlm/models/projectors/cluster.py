"""SQ-LLaVA's projector `cluster`: every token is told what the tokens like it hold, then an MLP with quick-GELU.

256 prototypes, two iterations, as its weights were trained; as many rows as tokens. `ln_1` is in the published weights
and takes no part in what they compute: it is kept as it came, as a buffer, and does not train.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_vlm.models.projectors.base import PROJECTORS, REFERENCE, OpsProjector
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.ops.projector import bias_gelu, recomputed_linear
from megatron_vlm.ops.prototypes import prototype_extract
from megatron_vlm.ops.reference_projector import PrototypeWeights

NUM_PROTOTYPES, NUM_ITERATIONS = 256, 2


class _UnusedNorm(nn.Module):
    """A LayerNorm's two vectors, kept."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(size))
        self.register_buffer("bias", torch.zeros(size))


@PROJECTORS.register("cluster")
class ClusterProjector(OpsProjector):
    """The prototype extractor and its MLP."""

    def __init__(self, vision_size: int, language_size: int) -> None:
        super().__init__()
        self.sim_alpha = nn.Parameter(torch.ones(1, 1, 1))
        self.sim_beta = nn.Parameter(torch.zeros(1, 1, 1))
        self.c = nn.Linear(vision_size, vision_size)
        self.v = nn.Linear(vision_size, vision_size)
        self.f = nn.Linear(vision_size, vision_size)
        self.ln_1 = _UnusedNorm(vision_size)
        # In the middle the published quick-GELU, which has no parameters.
        self.mlp = nn.Sequential(
            nn.Linear(vision_size, language_size), nn.Identity(), nn.Linear(language_size, language_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, t, c] -> rows [n, t, h]. The extractor has no kernel: asked for triton, it takes torch's."""
        centers, values, features = ((layer.weight, layer.bias) for layer in (self.c, self.v, self.f))
        weights = PrototypeWeights(centers, values, features, self.sim_alpha, self.sim_beta)
        backend = REFERENCE if self.backend == REFERENCE else AUTO
        tokens = prototype_extract(
            x, weights, num_prototypes=NUM_PROTOTYPES, num_iterations=NUM_ITERATIONS, backend=backend
        )
        first, second = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
        rows = functional.linear(tokens, first.weight)
        act = partial(bias_gelu, kind="quick", backend=self.backend)
        return recomputed_linear(act, second.weight, second.bias, rows, first.bias)
