"""The vision tower: any transformers vision model, cut at the selected hidden state.

What the selected hidden state does not need (later layers, the norm after them, a pooling head) is not thrown away: a
checkpoint that is exported must hold the whole tower, bit for bit. It is frozen, so that AdamW does not decay what has
no gradient; later layers move to `unused` and never run.

Names: `hf_name` gives every parameter the name it has in the whole transformers model, wherever it lives here.
"""

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vlm.models.vision.hidden_state import cut, select_hidden
from megatron_vlm.models.vision.survey import TowerSurvey, build_hf_tower


class VisionTower(nn.Module):
    """A cut transformers vision model, random weights.

    Args:
        survey: its facts.
        recompute: compute each layer's activations again in the backward pass.
    """

    def __init__(self, survey: TowerSurvey, recompute: bool = False) -> None:
        super().__init__()
        self.survey = survey
        self.model = build_hf_tower(survey.hf_config)
        unused = cut(self.model, survey.layers_path, survey.num_kept_layers)
        self.unused = nn.ModuleDict({str(survey.num_kept_layers + i): layer for i, layer in enumerate(unused)})
        if recompute:
            _recompute_layers(self.model.get_submodule(survey.layers_path))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.hf_name(name) not in survey.unreached)

    def hf_name(self, name: str) -> str:
        """The transformers name of a parameter or buffer of this module: `unused.23.x` -> `encoder.layers.23.x`."""
        where, _, rest = name.partition(".")
        assert where in ("model", "unused"), name
        return rest if where == "model" else f"{self.survey.layers_path}.{rest}"

    def train(self, mode: bool = True) -> "VisionTower":
        """Sets training mode; a frozen tower stays in evaluation mode, so that it has no dropout."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, H, W] -> features [n, tokens, width], n > 0; the pixels are cast to the tower's dtype."""
        pixels = pixels.to(next(self.model.parameters()).dtype)
        hidden = select_hidden(self.model, pixels, self.survey.selected)
        return hidden[:, self.survey.num_dropped_tokens :]


def _recompute_layers(layers: nn.Module) -> None:
    """Wraps every layer's forward in activation checkpointing, which needs no support by the model."""
    for layer in layers.children():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
