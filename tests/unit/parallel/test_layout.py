"""The layout against its definition: a partition, balanced, in the order in which attention needs it."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.errors import ParallelError
from megatron_vlm.parallel.layout import SequenceLayout, length_multiple, padded_length, row_length

degree = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> SequenceLayout:
    ring, ulysses, tensor = draw(degree), draw(degree), draw(degree)
    return SequenceLayout(length_multiple(ring, ulysses, tensor) * draw(st.integers(1, 6)), ring, ulysses, tensor)


def all_ranks(layout: SequenceLayout) -> list[tuple[int, int, int]]:
    return [(r, u, t) for r in range(layout.ring) for u in range(layout.ulysses) for t in range(layout.tensor)]


def defined_positions(layout: SequenceLayout, ring: int, ulysses: int, tensor: int) -> list[int]:
    """DESIGN D5, word by word, on lists."""
    if layout.ring == 1:
        mine = list(range(layout.length))
    else:
        size = layout.length // (2 * layout.ring)
        chunks = [list(range(i * size, (i + 1) * size)) for i in range(2 * layout.ring)]
        mine = chunks[ring] + chunks[2 * layout.ring - 1 - ring]
    for pieces, which in ((layout.ulysses, ulysses), (layout.tensor, tensor)):
        size = len(mine) // pieces
        mine = mine[which * size : (which + 1) * size]
    return mine


@given(layouts())
def test_positions_follow_the_definition(layout: SequenceLayout) -> None:
    for rank in all_ranks(layout):
        assert layout.positions(*rank).tolist() == defined_positions(layout, *rank)


@given(layouts())
def test_every_token_has_one_owner(layout: SequenceLayout) -> None:
    owned = torch.cat([layout.positions(*rank) for rank in all_ranks(layout)])
    assert owned.sort().values.tolist() == list(range(layout.length))
    assert {len(layout.positions(*rank)) for rank in all_ranks(layout)} == {layout.local_length}


@given(layouts())
def test_owners_and_index_invert_positions(layout: SequenceLayout) -> None:
    everything = torch.arange(layout.length)
    ring, ulysses, tensor = layout.owners(everything)
    index = layout.local_index(everything)
    for position in range(layout.length):
        rank = (int(ring[position]), int(ulysses[position]), int(tensor[position]))
        assert layout.positions(*rank)[index[position]] == position


@given(layouts())
def test_causal_work_is_equal_over_the_ring(layout: SequenceLayout) -> None:
    """Keys seen by all queries of a ring rank, the reason for the zigzag. (A contiguous cut fails this.)"""
    work = [0] * layout.ring
    for rank in all_ranks(layout):
        work[rank[0]] += int((layout.positions(*rank) + 1).sum())
    assert len(set(work)) == 1


def test_the_example_of_the_docstring() -> None:
    layout = SequenceLayout(16, ring=2, ulysses=2)
    assert [layout.positions(r, u).tolist() for r in (0, 1) for u in (0, 1)] == [
        [0, 1, 2, 3],
        [12, 13, 14, 15],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


@given(st.integers(1, 200), degree, degree, degree)
def test_padded_length_is_the_shortest_that_fits(num_tokens: int, ring: int, ulysses: int, tensor: int) -> None:
    length = padded_length(num_tokens, ring, ulysses, tensor)
    assert length >= num_tokens
    SequenceLayout(length, ring, ulysses, tensor)
    for shorter in range(num_tokens, length):
        with pytest.raises(ParallelError):
            SequenceLayout(shorter, ring, ulysses, tensor)


@given(degree, degree, degree, st.integers(1, 100))
def test_a_length_is_refused_exactly_where_it_cannot_be_cut(ring: int, ulysses: int, tensor: int, length: int) -> None:
    chunks = 2 * ring if ring > 1 else 1
    can_be_cut = length % chunks == 0 and (length // ring) % (ulysses * tensor) == 0
    if can_be_cut:
        SequenceLayout(length, ring, ulysses, tensor)
    else:
        with pytest.raises(ParallelError, match=f"found {length}, needed a positive multiple of"):
            SequenceLayout(length, ring, ulysses, tensor)


def test_a_layout_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SequenceLayout(8).length = 16


@pytest.mark.parametrize(
    ("parallel", "length"),
    [
        ({}, 67),
        ({"ulysses": 2, "ring": 2}, 68),
        ({"ring": 3}, 72),
        ({"tensor": 2, "sequence": True}, 68),
        ({"tensor": 2}, 67),
    ],
)
def test_rows_of_any_length_are_padded_to_what_the_ranks_of_a_recipe_cut(parallel: dict, length: int) -> None:
    assert row_length(67, ParallelConfig(**parallel)) == length
