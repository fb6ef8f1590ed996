"""Transformer Engine's linear layers around what can be had of them here: megatron-core's own in their place.

Not its arithmetic, which needs a GPU: that the layers go where they belong, that tokens filled up for them leave
results and gradients as they were, in every layout, and that they keep nothing in checkpoints.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks.pool import RankPool

SEQUENCE, ROWS, HIDDEN, CHANNELS = 6, 3, 16, 32


def stand_in(name: str) -> Any:
    """mcore's linear layer, which takes 16 tokens or a multiple and nothing else, as Transformer Engine does in FP8."""
    from megatron.core import tensor_parallel

    class StandIn(getattr(tensor_parallel, name)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            assert x.shape[0] * x.shape[1] % 16 == 0, f"{tuple(x.shape)}: not in multiples of 16"
            assert self.training or not FP8["enabled"], "FP8 outside training"
            return super().forward(x)

        def get_extra_state(self) -> Tensor:
            return torch.ones(3)

    return StandIn


FP8 = {"enabled": True}


class Autocast:
    """Of transformer_engine.pytorch."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        FP8["enabled"] = self.enabled

    def __exit__(self, *_: object) -> None:
        FP8["enabled"] = True


def installed() -> Any:
    """Modules by which Transformer Engine seems to be here."""
    extension = ModuleType("megatron.core.extensions.transformer_engine")
    extension.TEColumnParallelLinear = stand_in("ColumnParallelLinear")  # type: ignore[attr-defined]
    extension.TERowParallelLinear = stand_in("RowParallelLinear")  # type: ignore[attr-defined]
    package = ModuleType("transformer_engine.pytorch")
    package.fp8_autocast = Autocast  # type: ignore[attr-defined]
    return mock.patch.dict(
        sys.modules,
        {
            "megatron.core.extensions.transformer_engine": extension,
            "transformer_engine": ModuleType("transformer_engine"),
            "transformer_engine.pytorch": package,
        },
    )


def multiply(tensor: int, sequence: bool, fault: bool) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Result, and gradients of input and weight, of an mcore MLP's two linear layers: plain and filled up."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from transformers import LlamaConfig

    from megatron_vlm.config.megatron import transformer_config
    from megatron_vlm.models import transformer_engine
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.seeding import seed_everything
    from tests.unit.config.recipes import recipe

    grid = build_grid(GridSizes(tensor=tensor))
    seed_everything(0, grid)
    precision = {"params": "fp32"}
    llama = LlamaConfig(hidden_size=HIDDEN, intermediate_size=CHANNELS, num_attention_heads=2, num_hidden_layers=1)
    config = transformer_config(recipe(precision=precision, parallel={"tensor": tensor, "sequence": sequence}), llama)
    config.fp8_recipe = "tensorwise"
    with installed():
        filled_up = transformer_engine._linear_layers()
    kinds = {"plain": {kind: kind for kind in filled_up}, "filled up": filled_up}
    if fault:
        mock.patch.object(
            transformer_engine, "cut_off", lambda x, parts, missing: x[: len(x) - parts * missing]
        ).start()
    x = torch.randn(SEQUENCE, ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))
    if sequence:
        x = x.chunk(tensor)[grid.coordinates.tensor]
    found = {}
    try:
        for name, kind in kinds.items():
            found[name] = _through(kind[ColumnParallelLinear], kind[RowParallelLinear], config, x)
    finally:
        mock.patch.stopall()
    return found


def _through(column: Any, row: Any, config: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    settings = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": True}
    first = column(HIDDEN, CHANNELS, gather_output=False, is_expert=False, **settings)
    second = row(CHANNELS, HIDDEN, input_is_parallel=True, is_expert=False, **settings)
    for number, linear in enumerate((first, second)):
        torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(number))
    x = x.clone().requires_grad_()
    out = second(first(x)[0])[0]
    out.square().sum().backward()
    for linear in (first, second):
        assert linear.get_extra_state() is None
        linear.eval()
    torch.testing.assert_close(second(first(x)[0])[0], out)
    return out.detach(), x.grad, first.weight.grad


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_filling_up_changes_nothing(ranks: RankPool, tensor: int, sequence: bool) -> None:
    for found in ranks.run(tensor, multiply, tensor, sequence, False):
        for ours, plain in zip(found["filled up"], found["plain"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_cutting_off_the_end_alone_is_found(ranks: RankPool) -> None:
    """Under sequence parallelism every rank's part has its own zeros."""
    found = ranks.run(2, multiply, 2, True, True)[1]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found["filled up"][0], found["plain"][0])


@pytest.mark.parametrize(("tokens", "rows", "multiple", "missing"), [(6, 3, 16, 10), (6, 4, 16, 2), (8, 16, 16, 0)])
def test_missing_tokens(tokens: int, rows: int, multiple: int, missing: int) -> None:
    from megatron_vlm.models.transformer_engine import missing_tokens

    assert missing_tokens(tokens, rows, multiple) == missing
    assert (tokens + missing) * rows % multiple == 0


def test_they_take_the_place_of_megatron_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.config.schema import OpsConfig
    from megatron_vlm.errors import ConfigError
    from megatron_vlm.models.specs import layer_spec
    from megatron_vlm.models.transformer_engine import PaddedTokens, with_transformer_engine

    plain = layer_spec(OpsConfig())
    with installed():
        changed = with_transformer_engine(plain)
    attention, mlp = changed.submodules.self_attention.submodules, changed.submodules.mlp.submodules
    for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
        assert issubclass(linear, PaddedTokens)
    assert changed.submodules.input_layernorm == plain.submodules.input_layernorm
    assert not issubclass(plain.submodules.mlp.submodules.linear_fc1, PaddedTokens), "the spec given is left as it was"
    plain.submodules.mlp.submodules.linear_fc1 = SimpleNamespace
    with installed(), pytest.raises(ConfigError, match="linear_fc1 is .*SimpleNamespace"):
        with_transformer_engine(plain)
