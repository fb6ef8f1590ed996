"""ops.norm, ops.activation, ops.rope reach the language model's layers: the same results by the backend asked for."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import dispatch
from tests.helpers.ranks.solo import LLAMA, one_rank, small_recipe

FUSED = {"norm": "triton", "activation": "triton", "rope": "triton"}
ROWS, LENGTH = 2, 6


@pytest.fixture(scope="module")
def grid() -> Iterator[Any]:
    with one_rank() as grid:
        yield grid


def build(grid: Any, ops: dict[str, Any], changes: dict[str, Any] | None = None) -> Any:
    """One chunk of two layers with seeded weights, norms that are not one."""
    from transformers import AutoConfig

    from megatron_vlm.models.language import build_language_chunks

    changes = {"num_hidden_layers": 2, **(changes or {})}
    hf_config = AutoConfig.for_model(**{**LLAMA, **changes})
    (chunk,) = build_language_chunks(small_recipe(changes, {"ops": ops}), hf_config, grid)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return chunk


def results(chunk: Any) -> dict[str, torch.Tensor]:
    """Losses and every gradient."""
    generator = torch.Generator().manual_seed(5)
    ids, labels = torch.randint(0, LLAMA["vocab_size"], (2, ROWS, LENGTH), generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    loss = chunk(ids, positions, labels=labels)
    gradients = torch.autograd.grad(loss.sum(), list(chunk.parameters()))
    return {"loss": loss.detach()} | dict(zip(dict(chunk.named_parameters()), gradients, strict=True))


def difference(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel's function is applied from now on."""
    from megatron_vlm_kernels import gated, rms_norm, rope

    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        right = getattr(module, name)

        def counting(*arguments: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return right(*arguments, **keywords)

        monkeypatch.setattr(module, name, counting)

    for module, name in ((rms_norm, "norm_forward"), (gated, "gated_forward"), (rope, "rotate")):
        count(module, name)
    return calls


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_kernels_compute_the_layers(grid: Any, monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    changes = {"hidden_act": activation}
    expected = results(build(grid, {}, changes))
    calls = counted(monkeypatch)
    assert difference(results(build(grid, {}, changes)), expected) == 0 and not calls
    assert difference(results(build(grid, FUSED, changes)), expected) < 1e-5
    # Two layers: two norms each and the last; a gate each; queries and keys, forward and backward.
    assert calls == {"norm_forward": 5, "gated_forward": 2, "rotate": 8}


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_key_chooses_for_its_own(grid: Any, monkeypatch: pytest.MonkeyPatch, op: str, backend: str) -> None:
    expected, calls = results(build(grid, {})), counted(monkeypatch)
    assert difference(results(build(grid, {op: backend})), expected) < 1e-5
    kernel = {"norm": "norm_forward", "activation": "gated_forward", "rope": "rotate"}[op]
    assert set(calls) == ({kernel} if backend == "triton" else set())


def test_a_kernel_that_is_wrong_is_seen(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm_kernels import rms_norm

    right = rms_norm.norm_forward
    monkeypatch.setattr(
        rms_norm, "norm_forward", lambda x, residual, weight, eps: right(x, None, weight, eps)  # forgets the residual
    )  # fmt: skip
    assert difference(results(build(grid, FUSED)), results(build(grid, {}))) > 1e-2


def test_generation_by_the_step_written_out_takes_the_same_backends(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.generation.token_step import TokenStep
    from megatron_vlm.parallel.context_attention import KVCache

    calls, found = counted(monkeypatch), []
    for ops in ({}, FUSED):
        chunk, cache = build(grid, ops).train(False), KVCache(LENGTH + 1)
        with torch.no_grad():
            chunk(torch.arange(LENGTH)[None], torch.arange(LENGTH)[None], cache=cache)
            calls.clear()
            assert TokenStep.describes(chunk)
            found.append(TokenStep(chunk, cache)(torch.tensor([[7]]), torch.tensor([[LENGTH]]), None))
        assert calls == ({"norm_forward": 5, "gated_forward": 2, "rotate": 2} if ops else {})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_asked_for_and_unable_is_told_before_anything_is_built(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    for op in FUSED:
        with pytest.raises(ConfigError, match=f"ops.{op}: 'triton' cannot run: it needs a CUDA device, found cpu"):
            build(grid, {op: "triton"})


def test_an_operation_that_nothing_uses_is_not_asked(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FP8 nothing is quantised; validation says that the key is idle."""
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    build(grid, {"fp8_quantise": "triton"})


def test_a_gate_of_an_architectures_own_is_megatron_cores(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clamped: ours does not compute it, and does not pretend to."""
    from megatron_vlm.models import architectures

    own = architectures.LanguageArchitecture(settings=lambda config: {"activation_func_clamp_value": 0.05})
    monkeypatch.setitem(architectures.LANGUAGE_MODELS._entries, "llama", own)
    clamped = results(build(grid, {"norm": "triton"}))
    monkeypatch.undo()
    assert difference(clamped, results(build(grid, {}))) > 1e-2
    monkeypatch.setitem(architectures.LANGUAGE_MODELS._entries, "llama", own)
    with pytest.raises(ConfigError, match="'triton' cannot run: this model's MLP has a gate of its own"):
        build(grid, {"activation": "triton"})
