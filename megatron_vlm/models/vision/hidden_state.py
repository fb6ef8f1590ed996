"""The selected hidden state of a transformers vision model, which is cut behind it.

The survey tries both on the meta device, the tower does both with weights: what was surveyed is what runs.

Hazard: a model that normalises its last hidden state (`tie_last_hidden_states`) would do so to the selected one when it
is cut there; `cut` turns that off unless the last layer itself was selected.
"""

from torch import Tensor, nn


def cut(model: nn.Module, layers_path: str, kept: int) -> nn.ModuleList:
    """Leaves the first `kept` layers in the model and returns the others."""
    parent_path, _, attribute = layers_path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layers = getattr(parent, attribute)
    assert isinstance(layers, nn.ModuleList)
    setattr(parent, attribute, layers[:kept])
    if kept < len(layers):
        model.config.tie_last_hidden_states = False  # type: ignore[union-attr]
    return layers[kept:]


def select_hidden(model: nn.Module, pixels: Tensor, selected: int) -> Tensor:
    """pixels [n, 3, H, W] -> hidden state [n, tokens, width] of a cut model (never its normalised last state)."""
    return model(pixel_values=pixels, output_hidden_states=True, return_dict=True).hidden_states[selected]
