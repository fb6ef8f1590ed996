"""Projectors by name."""

import pytest
import torch
from torch import nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.projectors import build_projector


@pytest.mark.parametrize(("name", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp8x_gelu", 8)])
def test_depth_and_width(name: str, depth: int) -> None:
    projector = build_projector(name, 6, 10)
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == depth
    assert projector(torch.randn(2, 3, 6)).shape == (2, 3, 10)


def test_mlp2x_is_llava_s() -> None:
    projector = build_projector("mlp2x_gelu", 6, 10)
    weights = projector.state_dict()
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(4, 6)
    hidden = nn.functional.gelu(x @ weights["0.weight"].T + weights["0.bias"])
    torch.testing.assert_close(projector(x), hidden @ weights["2.weight"].T + weights["2.bias"])


def test_identity() -> None:
    x = torch.randn(4, 6)
    assert build_projector("identity", 6, 6)(x) is x
    with pytest.raises(ConfigError, match="width 6 and a language model of width 10"):
        build_projector("identity", 6, 10)


@pytest.mark.parametrize("name", ["mlp2x_gelo", "mlp0x_gelu", "conv"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        build_projector(name, 6, 10)
