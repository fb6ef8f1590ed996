"""SQ-LLaVA's projector: published names and number of parameters, values, what trains."""

import pytest
import torch

from megatron_vlm.models.projectors import build_projector


def test_published_names_and_number_of_parameters():
    with torch.device("meta"):
        state = build_projector("cluster", 1024, 4096).state_dict()
    layers = ("c", "v", "f", "ln_1", "mlp.0", "mlp.2")
    assert set(state) == {"sim_alpha", "sim_beta"} | {
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }
    assert sum(tensor.numel() for tensor in state.values()) == 24_130_562
    assert state["sim_alpha"].shape == state["sim_beta"].shape == (1, 1, 1)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_backends_agree_and_all_that_trains_has_a_gradient(backend):
    torch.manual_seed(0)
    projector = build_projector("cluster", 8, 12, "auto")
    x = torch.randn(2, 9, 8)
    expected = projector(x)
    projector.backend = backend
    rows = projector(x)
    assert rows.shape == (2, 9, 12)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    rows.square().sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())
    assert not any(name.startswith("ln_1") for name, _ in projector.named_parameters())


def test_equal_tokens_stay_equal_wherever_they_are():
    torch.manual_seed(0)
    projector = build_projector("cluster", 8, 12)
    rows = projector(torch.randn(1, 1, 8).expand(1, 12, 8))
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
