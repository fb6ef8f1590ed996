"""How `parallel.context` is split: Ulysses within a node while heads last, ring beyond; and that it is told."""

import logging

import pytest

from megatron_vlm.config.context import split_context
from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training import recipe as module
from megatron_vlm.training.recipe import resolve_recipe
from tests.unit.config.recipes import FACTS, facts, knows, recipe


@pytest.mark.parametrize(
    ("context", "tensor", "heads", "per_node", "expected"),
    [
        (8, 1, 32, 8, (8, 1)),
        (8, 1, 28, 8, (4, 2)),  # 28 heads are 4 x 7
        (8, 4, 28, 8, (1, 8)),  # 7 of each tensor rank, and a node has room for groups of 2
        (8, 2, 32, 8, (4, 2)),  # a group of 4 spans 8 ranks
        (16, 1, 32, 8, (8, 2)),
        (6, 1, 32, 8, (2, 3)),
        (4, 1, 32, 6, (2, 2)),  # groups of 4 would straddle nodes of 6
        (2, 8, 32, 4, (1, 2)),  # tensor ranks of two nodes
        (1, 1, 32, 1, (1, 1)),
    ],
)
def test_the_split(context: int, tensor: int, heads: int, per_node: int, expected: tuple[int, int]) -> None:
    found, reason = split_context(ParallelConfig(context=context, tensor=tensor), heads, per_node)
    assert (found.ulysses, found.ring, found.context) == (*expected, None)
    assert found.replica == context * tensor
    assert f"parallel.context {context} is taken as ulysses {expected[0]} x ring {expected[1]}" in reason


def test_it_is_told_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(get_logger(module.__name__), "handlers", [listener])
    knows(monkeypatch, FACTS)
    resolved = resolve_recipe(recipe(parallel__context=4, parallel__tensor=2), 8, ranks_per_node=4)
    settled = resolved.config
    assert resolved.facts is FACTS and (settled.parallel.ulysses, settled.parallel.ring) == (2, 2)
    assert said == [
        "parallel.context 4 is taken as ulysses 2 x ring 2: 2 is its largest divisor that divides the 4 query heads "
        "per tensor rank and keeps the group within a node of 4 ranks"
    ]
    assert resolve_recipe(settled, 8, ranks_per_node=8) == resolved and len(said) == 1


def test_cudnn_is_refused_where_the_split_has_a_ring(monkeypatch):
    knows(monkeypatch, FACTS)
    asked = recipe(parallel__context=4, data__packing=True, ops__attention="cudnn")
    settled = resolve_recipe(asked, 4, ranks_per_node=4).config
    assert (settled.parallel.ulysses, settled.parallel.ring) == (4, 1)
    with pytest.raises(ConfigError, match="ops.attention: found cudnn with parallel.ring 2 and data.packing rows"):
        resolve_recipe(asked, 4, ranks_per_node=2)


def test_fp8_keys_that_do_nothing_are_told_in_one_line(monkeypatch):
    said = []
    knows(monkeypatch, FACTS)
    monkeypatch.setattr("megatron_vlm.training.recipe.logger.warning", lambda text, *parts: said.append(text % parts))
    resolve_recipe(recipe(precision={"fp8_backend": "native", "fp8_gradients": "e5m2"}), 1, ranks_per_node=1)
    assert said == ["precision.fp8_backend, precision.fp8_gradients: without effect, as precision.fp8 is null"]
    resolve_recipe(recipe(), 1, ranks_per_node=1)
    assert len(said) == 1


@pytest.mark.parametrize(("known", "told"), [(None, False), (2048, False), (2047, True)])
def test_rows_longer_than_the_models_context_are_told(monkeypatch, known, told):
    said = []
    knows(monkeypatch, facts(context_tokens=known))
    monkeypatch.setattr("megatron_vlm.training.recipe.logger.warning", lambda text, *parts: said.append(text % parts))
    resolve_recipe(recipe(training__sequence_length=2048), 1, ranks_per_node=1)
    assert [text.partition(":")[0] for text in said] == ["training.sequence_length 2048"] * told
    assert all("knows 2047 positions (max_position_embeddings)" in text for text in said)
    resolve_recipe(recipe(training__sequence_length=2048, data__packing=True), 1, ranks_per_node=1)
    assert len(said) == told
