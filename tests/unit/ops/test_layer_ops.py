"""The layer operations' doors: backends agree with their twins, and one that cannot run says why."""

from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import dispatch, reference
from megatron_vlm.ops.activation import GATED, gated
from megatron_vlm.ops.norm import NORM, add_rms_norm, rms_norm
from megatron_vlm.ops.rope import ROPE, apply_rope, rope_tables

X, RESIDUAL = (torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
WEIGHT = torch.linspace(0.5, 1.5, 16)
POSITIONS, FREQUENCIES = torch.tensor([[0, 1, 2, 0, 1]] * 3), torch.tensor([1.0, 0.1])


def every(backend):
    """Each layer operation on the same inputs."""
    heads, tables = X.view(3, 5, 4, 4), rope_tables(POSITIONS, FREQUENCIES)
    return {
        "norm": add_rms_norm(X, RESIDUAL, WEIGHT, 1e-5, backend=backend)[0],
        "activation": gated(X, "gelu", backend=backend),
        "rope": apply_rope(heads, *tables, backend=backend),
    }


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backends_equal_the_twins(backend):
    for ours, expected in zip(every(backend).values(), every("reference").values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_sum_is_returned_as_it_was_normed():
    normed, total = add_rms_norm(X, RESIDUAL, WEIGHT, 1e-5)
    assert total.equal(X + RESIDUAL) and normed.equal(rms_norm(total, WEIGHT, 1e-5))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(normed, rms_norm(X, WEIGHT, 1e-5))


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_the_gate_is_the_first_half(activation):
    gate, up = X[..., :8], X[..., 8:]
    expected = reference.ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(gated(X, activation), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gated(X, activation), reference.ACTIVATIONS[activation](up) * gate)


def test_in_bf16_the_torch_gate_rounds_once_more_than_its_twin():
    """As megatron-core's does: what was trained with it goes on with it."""
    x = X.bfloat16()
    gate, up = x.chunk(2, dim=-1)
    assert gated(x, "silu", backend="torch").equal(torch.nn.functional.silu(gate) * up)
    exact = reference.gated(x.double(), "silu")
    assert (reference.gated(x, "silu") - exact).norm() < (gated(x, "silu", backend="torch") - exact).norm()


def test_without_triton_auto_takes_torch_and_triton_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: None)
    asked = ((NORM, (X, WEIGHT)), (GATED, (X,)), (ROPE, (X,)))
    for operation, inputs in asked:
        assert operation.find("auto", *inputs).name == "torch"
        with pytest.raises(ConfigError, match="'triton' cannot run: the package triton is not installed"):
            operation.find("triton", *inputs)


def test_a_residual_of_another_dtype_is_not_for_triton():
    """It would be rounded to x's dtype, and torch's sum is of the wider one."""
    x, weight = X.bfloat16(), WEIGHT.bfloat16()
    with pytest.raises(ConfigError, match="it needs one dtype, found torch.bfloat16 and torch.float32"):
        add_rms_norm(x, RESIDUAL, weight, 1e-5, backend="triton")
    assert add_rms_norm(x, RESIDUAL, weight, 1e-5)[1].dtype == torch.float32
    assert add_rms_norm(x, RESIDUAL.bfloat16(), weight, 1e-5, backend="triton")[1].dtype == torch.bfloat16


def test_rows_that_spill_are_not_for_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    row = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(4, 16384))
    assert NORM.find("auto", row, row).name == "triton"
    row.shape = (4, 16392)
    assert NORM.find("auto", row, row).name == "torch"
    with pytest.raises(ConfigError, match="at most 16,384, what a program's registers hold, found 16,392"):
        NORM.find("triton", row, row)


def test_without_the_interpreter_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    with pytest.raises(ConfigError, match="ops.norm: 'triton' cannot run: it needs a CUDA device, found cpu"):
        rms_norm(X, WEIGHT, 1e-5, backend="triton")
    assert NORM.find("auto", X, WEIGHT).name == "torch"


def test_under_the_interpreter_auto_passes_triton_over():
    assert dispatch.interpreter_objection(X) == "Triton's interpreter is for tests"
    assert [NORM.find(name, X, WEIGHT).name for name in ("auto", "triton")] == ["torch", "triton"]
