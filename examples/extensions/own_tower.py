"""An own vision tower: any transformers model that gives hidden states for pixels, registered with transformers.

Needed of it: a config with `num_hidden_layers` and `patch_size`, one ModuleList of that many layers, and in the output
`hidden_states` [n, tokens, width], one token per patch. `select_layer` chooses among them as in any other tower.
Weights of its own come from `model.vision.path`; training one from nothing:

    extensions: [examples.extensions.own_tower]
    model:
      vision:
        config: {model_type: conv_tower, image_size: 28, patch_size: 7, hidden_size: 48, num_hidden_layers: 3}
"""

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class ConvTowerConfig(PretrainedConfig):
    """Sizes."""

    model_type = "conv_tower"

    def __init__(self, image_size=224, patch_size=16, hidden_size=256, num_hidden_layers=4, **rest) -> None:
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        super().__init__(**rest)


class ConvTower(PreTrainedModel):
    """Patches, then 3 x 3 convolutions over the grid of patches, each added to its input."""

    config_class = ConvTowerConfig

    def __init__(self, config: ConvTowerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, pixel_values: Tensor, **switches: bool) -> BaseModelOutput:
        """pixels [n, 3, H, W] -> hidden states [n, patches, width], patches row by row."""
        grids = [self.patches(pixel_values)]  # [n, width, rows, columns]
        for layer in self.layers:
            grids.append(grids[-1] + nn.functional.gelu(layer(grids[-1])))
        states = tuple(grid.flatten(2).transpose(1, 2) for grid in grids)
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)


AutoConfig.register("conv_tower", ConvTowerConfig)
AutoModel.register(ConvTowerConfig, ConvTower)
