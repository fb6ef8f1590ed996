"""The projectors of LLaVA's, VILA's and SQ-LLaVA's directories in plain layers, for what verifies a conversion.

Written from the papers and the published tensors' names, and apart from `models.projectors` and `ops`: a mistake there
must not be here too. n images, t tokens, c the tower's width, h the language model's, p prototypes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_vlm.errors import ConversionError, one_line

NUM_PROTOTYPES = 256


def plain_projector(
    origin: str, settings: Mapping[str, Any], state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> nn.Module:
    """The projector that a config names, filled.

    Args:
        origin: for messages.
        settings: config.json; `mm_projector_type`, and what says the order of squares.
        state: its tensors under its own names.
        options: what the config leaves open: `downsample_order`, column or row.

    Raises:
        ConversionError: tensors that are not those of that projector.
    """
    kind = settings.get("mm_projector_type", "linear")
    try:
        if not state:
            raise RuntimeError("it has no tensor")
        if kind.startswith("mlp_downsample"):
            said = settings.get("mm_downsample_order") or options.get("downsample_order")
            order = said if kind == "mlp_downsample" else "row"
            projector: nn.Module = Downsample(3 if kind.endswith("3x3_fix") else 2, order == "column", state)
        elif kind == "cluster":
            projector = Cluster(state)
        else:
            projector = _mlp(state)
        projector.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise ConversionError(f"{origin}: the projector is not one of LLaVA's: {reason}") from error
    return projector


def _linear(weight: Tensor) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0])


def _mlp(state: Mapping[str, Tensor]) -> nn.Module:
    """One linear layer, or an nn.Sequential of several with GELU between, as LLaVA itself has it."""
    by_number = sorted(state.items(), key=lambda item: (len(item[0]), item[0]))
    linear = [_linear(tensor) for name, tensor in by_number if name.endswith("weight") and tensor.dim() == 2]
    parts = [part for layer in linear for part in (layer, nn.GELU())]
    return linear[0] if "weight" in state and linear else nn.Sequential(*parts[:-1])


class Downsample(nn.Module):
    """VILA's: squares of `factor` x `factor` patches, each one row after a norm and linear layers.

    Args:
        by_columns: the order of the squares.
        state: its tensors; what has no number in it has no parameters: the squares first, then GELUs.
    """

    def __init__(self, factor: int, by_columns: bool, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.factor, self.by_columns = factor, by_columns
        last = max(int(name.split(".")[1]) for name in state)
        layers: list[nn.Module] = [nn.Identity()]
        for number in range(1, last + 1):
            weight = state.get(f"layers.{number}.weight")
            if weight is None:
                layers.append(nn.GELU())
            else:
                layers.append(nn.LayerNorm(len(weight)) if weight.dim() == 1 else _linear(weight))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, side * side, c] -> rows [n, squares, h]."""
        side = math.isqrt(x.shape[1])
        missing = -side % self.factor
        grid = functional.pad(x.view(len(x), side, side, -1), (0, 0, 0, missing, 0, missing))
        rows = []
        for first in range(0, side, self.factor):
            for second in range(0, side, self.factor):
                top, left = (second, first) if self.by_columns else (first, second)
                rows.append(grid[:, top : top + self.factor, left : left + self.factor].flatten(1))
        out: Tensor = self.layers(torch.stack(rows, dim=1))
        return out


class Cluster(nn.Module):
    """SQ-LLaVA's prototype extractor and its MLP."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.sim_alpha, self.sim_beta = nn.Parameter(torch.ones(1, 1, 1)), nn.Parameter(torch.zeros(1, 1, 1))
        self.c, self.v, self.f = (_linear(state[f"{name}.weight"]) for name in "cvf")
        self.ln_1 = nn.LayerNorm(len(state["ln_1.weight"]))  # stored, and not used
        self.mlp = nn.Sequential(_linear(state["mlp.0.weight"]), nn.Identity(), _linear(state["mlp.2.weight"]))

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, t, c] -> rows [n, t, h]."""
        value, feature = self.v(x).transpose(1, 2), self.f(x)  # [n, c, t], [n, t, c]
        center, gathered = (functional.adaptive_avg_pool1d(y.mT, NUM_PROTOTYPES).mT for y in (x, feature))  # [n, p, c]
        for _ in range(2):
            score = functional.normalize(self.c(center), dim=-1) @ functional.normalize(value, dim=-1)
            center = score.softmax(dim=1) @ feature
        cosine = functional.cosine_similarity(center[:, :, None], x[:, None], dim=-1)  # [n, p, t]
        similarity = torch.sigmoid(self.sim_beta + self.sim_alpha * cosine)
        own = functional.one_hot(similarity.argmax(dim=1), NUM_PROTOTYPES).mT  # [n, p, t]
        similarity = similarity * own
        gathered = (torch.einsum("npt,ntc->npc", similarity, feature) + gathered) / (own.sum(2, keepdim=True) + 1)
        hidden = self.mlp[0](x + torch.einsum("npt,npc->ntc", similarity, gathered))
        rows: Tensor = self.mlp[2](hidden * torch.sigmoid(1.702 * hidden))
        return rows
