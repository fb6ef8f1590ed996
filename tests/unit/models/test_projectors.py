"""Projectors by name."""

import pytest
import torch
from torch import nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.projectors import build_projector, count_rows
from megatron_vlm.ops.projector import BIAS_GELU, SPACE_TO_DEPTH


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


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "triton"])
@pytest.mark.parametrize("depth", [2, 3])
def test_an_mlp_computes_what_plain_layers_do_by_the_backend_asked_for(
    depth: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    projector, asked = build_projector(f"mlp{depth}x_gelu", 6, 10, backend), []
    select = BIAS_GELU.select
    monkeypatch.setattr(BIAS_GELU, "select", lambda name, *inputs: asked.append(name) or select(name, *inputs))
    x = torch.randn(2, 3, 6, requires_grad=True)
    plain = nn.Sequential(*projector)
    ours, theirs = projector(x), plain(x)
    assert asked == [backend] * (depth - 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    tensors, gradient = (x, *projector.parameters()), torch.randn_like(ours)
    found, expected = (torch.autograd.grad(rows, tensors, gradient) for rows in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert list(projector.state_dict()) == [f"{2 * i}.{part}" for i in range(depth) for part in ("weight", "bias")]


@pytest.mark.parametrize("name", ["identity", "linear", "mlp1x_gelu"])
def test_a_backend_of_a_projector_that_has_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"ops.projector: found 'triton' with model.projector.type '{name}'"):
        build_projector(name, 6, 6, "triton")
    build_projector(name, 6, 6, "auto")


def test_a_survey_chooses_no_backend(caplog: pytest.LogCaptureFixture) -> None:
    SPACE_TO_DEPTH._announced.clear()
    with caplog.at_level("INFO"):
        assert count_rows("mlp_downsample", 16, 6) == 4
    assert "auto took" not in caplog.text
    assert SPACE_TO_DEPTH.key == "ops.projector (space to depth)"


def test_identity() -> None:
    x = torch.randn(4, 6)
    assert build_projector("identity", 6, 6)(x) is x
    with pytest.raises(ConfigError, match="width 6 and a language model of width 10"):
        build_projector("identity", 6, 10)


@pytest.mark.parametrize("name", ["mlp2x_gelo", "mlp0x_gelu", "conv"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        build_projector(name, 6, 10)
