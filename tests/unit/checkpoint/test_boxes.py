"""Ranges of a flattened tensor as blocks of it: in order, nothing twice, nothing left out."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.checkpoint.optimizer_state import Box, boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """A shape of up to four dimensions and a range of its elements."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


def elements(shape: list[int], found: list[Box]) -> list[int]:
    """The flat positions of the blocks' elements, block by block."""
    positions: list[int] = []
    for offset, size in found:
        block = torch.arange(prod(shape)).view(shape)
        for dim, (first, length) in enumerate(zip(offset, size, strict=True)):
            block = block.narrow(dim, first, length)
        positions += block.flatten().tolist()
    return positions


@given(ranges())
def test_blocks_cover_the_range_in_order(case: tuple[list[int], int, int]) -> None:
    shape, start, end = case
    found = list(boxes(shape, start, end))
    assert elements(shape, found) == list(range(start, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_range_is_the_end_of_a_row_whole_rows_and_the_start_of_one() -> None:
    assert list(boxes((5, 4), 3, 14)) == [((0, 3), (1, 1)), ((1, 0), (2, 4)), ((3, 0), (1, 2))]
    assert list(boxes((5, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(boxes((5, 4), 0, 20)) == [((0, 0), (5, 4))]
    assert list(boxes((5, 4), 8, 8)) == []
