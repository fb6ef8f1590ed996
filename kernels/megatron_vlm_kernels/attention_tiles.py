"""Rectangles of queries and keys as a table of tiles, so that any number of them is one launch.

A rectangle is some neighbouring queries of one row and some neighbouring keys; within it query i sees key j iff
i + lower <= j <= i + upper (both counted from the rectangle's own first). So causal, full and windowed rectangles are
one kind, and short documents share a launch with long ones.

Hazard: rectangles of one launch must not write the same place. Forward and dq write queries, dk and dv keys; where two
rectangles meet there, `launches` puts them into launches of their own. The sums stay in a fixed order: no atomics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 2**30  # as `upper`, and negative as `lower`: no bound; far from the end of int32, to be added to
NUM_COLUMNS = 9


class Rectangle(NamedTuple):
    """Queries [first_query, + num_queries) of row `q_row`, keys [first_key, + num_keys) of row `k_row`."""

    q_row: int
    first_query: int
    num_queries: int
    k_row: int
    first_key: int
    num_keys: int
    lower: int = -UNBOUNDED
    upper: int = UNBOUNDED


class RectangleList:
    """Rectangles, and the tables made of them so far."""

    def __init__(self, rectangles: Sequence[Rectangle]) -> None:
        self.rectangles = tuple(rectangles)
        self._known: dict[tuple[int, bool, torch.device], list[Tensor]] = {}

    def launches(self, block: int, of_keys: bool, device: torch.device) -> list[Tensor]:
        """A table [num_tiles, NUM_COLUMNS] int32 for each launch: a tile's rectangle, and where in it the tile starts.

        Args:
            block: queries of a tile, or keys.
            of_keys: tiles cut the keys; else the queries.
        """
        key = block, of_keys, device
        if key not in self._known:
            waves = _disjoint(self.rectangles, of_keys)
            self._known[key] = [_table(wave, block, of_keys).to(device, non_blocking=True) for wave in waves]
        return self._known[key]


def _disjoint(rectangles: Sequence[Rectangle], of_keys: bool) -> list[list[Rectangle]]:
    """Rectangles in as few groups as it takes for none to share queries, or keys, with another of its group."""

    def place(one: Rectangle) -> tuple[int, int, int]:
        return (one.k_row, one.first_key, one.num_keys) if of_keys else (one.q_row, one.first_query, one.num_queries)

    waves: list[list[Rectangle]] = []
    ends: list[tuple[int, int]] = []  # of each group: row and stop of its last
    for rectangle in sorted(rectangles, key=place):
        row, start, length = place(rectangle)
        free = next((number for number, end in enumerate(ends) if end <= (row, start)), len(ends))
        if free == len(ends):
            waves.append([])
            ends.append((row, start))
        waves[free].append(rectangle)
        ends[free] = row, start + length
    return waves


def _table(rectangles: Sequence[Rectangle], block: int, of_keys: bool) -> Tensor:
    """[num_tiles, NUM_COLUMNS] int32, the tiles with most to do first: the last ones to start should end soon."""
    tiles = []
    for one in rectangles:
        cut, across = (one.num_keys, one.num_queries) if of_keys else (one.num_queries, one.num_keys)
        below, above = (-one.upper, -one.lower) if of_keys else (one.lower, one.upper)
        for start in range(0, cut, block):
            stop = min(start + block, cut)
            work = min(across, stop + above) - max(0, start + below)
            tiles.append((-work, (*one, start)))
    return torch.tensor([row for _, row in sorted(tiles)], dtype=torch.int32).view(-1, NUM_COLUMNS)
