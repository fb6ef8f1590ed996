"""Mistakes a weight table can hold, to plant while a model is converted: `verify` exists to catch them.

Every one leaves all names and shapes right, and import and export of a wrong table are still inverse, so that nothing
but running the model can tell. `TELLS` says which place of a comparison must be named.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

LAYER = 1  # the wrong one
TELLS = {
    "swapped_query_key": "decoder layer 1 attention",  # needs as many key heads as query heads
    "swapped_key_value": "decoder layer 1 attention",
    "heads_not_grouped": "decoder layer 1 attention",
    "biases_not_grouped": "decoder layer 1 attention",  # needs biases
    "swapped_norms": "decoder layer 1 attention",
    "swapped_gate_up": "decoder layer 1 MLP",
    "fused_key_value_swapped": "decoder layer 1 attention",  # these two need fused sources
    "fused_gate_up_swapped": "decoder layer 1 MLP",
    "swapped_layers": "decoder layer 0 attention",
    "wrong_projector_index": "projector",  # needs a tower of the language model's width
    "tower_swapped_query_key": "tower layer 1",
    "tower_swapped_layers": "tower layer 0",
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Patches the table for the length of the context."""
    with contextlib.ExitStack() as stack:
        for patch in FAULTS[name]():
            stack.enter_context(patch)
        yield


def _entry(ending: str, spoil: Callable[[Any], Any]) -> list[Any]:
    """One entry of one layer is another one."""
    from megatron_vlm.conversion import mappings

    original = mappings._layer_mappings

    def spoiled(hf_config: Any, layer: int) -> list[Any]:
        table = original(hf_config, layer)
        hit = [layer == LAYER and entry.name.endswith(ending) for entry in table]
        assert layer != LAYER or any(hit), f"no {ending} to spoil"
        return [spoil(entry) if is_hit else entry for entry, is_hit in zip(table, hit, strict=True)]

    return [mock.patch.object(mappings, "_layer_mappings", spoiled)]


def _reordered(ending: str, order: Sequence[int]) -> list[Any]:
    """An entry takes its sources in another order."""
    return _entry(ending, lambda entry: replace(entry, sources=tuple(entry.sources[i] for i in order)))


def _fused_in_another_order(ending: str, order: Sequence[int]) -> list[Any]:
    """An entry whose sources are one tensor takes its parts, of equal rows, in another order."""

    def spoil(entry: Any) -> Any:
        class Wrong(type(entry.parts)):  # type: ignore[misc]
            def shard(self, full: Any, rank: int, size: int) -> Any:
                return super().shard([full[i] for i in order], rank, size)

            def row_runs(self) -> Any:
                return [(order[source], first, after) for source, first, after in super().row_runs()]

        return replace(entry, parts=Wrong(**vars(entry.parts)))

    return _entry(ending, spoil)


def _swapped(one: str, other: str) -> Callable[[str], str]:
    """In a name, the one becomes the other and the other the one."""
    return lambda name: name.replace(one, "\0").replace(other, one).replace("\0", other)


def _norms() -> list[Any]:
    swap = _swapped("input_layernorm", "post_attention_layernorm")
    return _entry("layernorm.weight", lambda entry: replace(entry, sources=(swap(entry.sources[0]),)))


def _layers() -> list[Any]:
    """Ours 0 is theirs 1 and the other way round."""
    from megatron_vlm.conversion import mappings

    original, swap = mappings._layer_mappings, _swapped("layers.0.", "layers.1.")

    def spoiled(hf_config: Any, layer: int) -> list[Any]:
        return [replace(entry, sources=tuple(map(swap, entry.sources))) for entry in original(hf_config, layer)]

    return [mock.patch.object(mappings, "_layer_mappings", spoiled)]


def _renamed(function: str, swap: Callable[[str], str]) -> list[Any]:
    """The names that tower or projector are filled from."""
    from megatron_vlm.conversion import table

    original = getattr(table, function)
    return [mock.patch.object(table, function, lambda name: swap(original(name)))]


FAULTS: dict[str, Callable[[], list[Any]]] = {
    "swapped_query_key": lambda: _reordered("linear_qkv.weight", (1, 0, 2)),
    "swapped_key_value": lambda: _reordered("linear_qkv.weight", (0, 2, 1)),
    "heads_not_grouped": lambda: _entry("linear_qkv.weight", lambda entry: replace(entry, num_groups=1)),
    "biases_not_grouped": lambda: _entry("linear_qkv.bias", lambda entry: replace(entry, num_groups=1)),
    "swapped_norms": _norms,
    "swapped_gate_up": lambda: _reordered("linear_fc1.weight", (1, 0)),
    "fused_key_value_swapped": lambda: _fused_in_another_order("linear_qkv.weight", (0, 2, 1)),
    "fused_gate_up_swapped": lambda: _fused_in_another_order("linear_fc1.weight", (1, 0)),
    "swapped_layers": _layers,
    "wrong_projector_index": lambda: _renamed("projector_name", _swapped("linear_1", "linear_2")),
    "tower_swapped_query_key": lambda: _renamed(
        "tower_name", _swapped(f"layers.{LAYER}.self_attn.q", f"layers.{LAYER}.self_attn.k")
    ),
    "tower_swapped_layers": lambda: _renamed("tower_name", _swapped("layers.0.", "layers.1.")),
}
