"""Ranks as rows: which are drawn, where, and what stands before them. Every figure with a row per rank uses this.

Ranks of a replica stand together, in the order stage, context, tensor. Of many ranks whole replicas are drawn, as many
as fit; the others are like them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.planner.layout import LayoutView, RankView

from .svg import GAP, LABELS, REPLICA_GAP, ROW, WIDTH, line, rect, text

MOST_ROWS = 32
NUM_COLOURS = 8


@dataclass(frozen=True)
class Row:
    """A rank and the top of its row."""

    rank: RankView
    y: float


def replicas_shown(sizes: GridSizes, most: int = MOST_ROWS) -> int:
    """Whole replicas of at most so many ranks together; at least one."""
    return max(1, min(sizes.data, most // sizes.replica))


def left_out(view: LayoutView, most: int = MOST_ROWS) -> str:
    """A sentence where not all ranks are drawn."""
    shown = replicas_shown(view.sizes, most)
    if shown == view.sizes.data:
        return ""
    return f" Drawn: {shown} of {view.sizes.data} replicas; the others are arranged alike."


def place(view: LayoutView, top: float = 0.0, above: float = 0.0, most: int = MOST_ROWS) -> tuple[list[Row], float]:
    """The rows drawn, and the height they end at. `above`: room that each replica has before its first row."""
    rows, y = [], top
    for data in range(replicas_shown(view.sizes, most)):
        y += above + (REPLICA_GAP if data else 0)
        for rank in view.replica(data):
            rows.append(Row(rank, y))
            y += ROW + GAP
    return rows, y - GAP


def labels(view: LayoutView, rows: list[Row]) -> Iterator[str]:
    """The ranks' names and places, and a line between replicas."""
    for number, row in enumerate(rows):
        yield rect(0, row.y + 3, 4, ROW - 6, colour(view.sizes, row.rank))
        yield text(12, row.y + 16.5, f"rank {row.rank.rank}", "name")
        yield text(LABELS - 14, row.y + 16.5, coordinates(view.sizes, row.rank), "quiet", "end")
        if number and row.rank.at.data != rows[number - 1].rank.at.data:
            middle = rows[number - 1].y + ROW + (GAP + REPLICA_GAP) / 2
            yield line(0, middle, WIDTH, middle)


def coordinates(sizes: GridSizes, rank: RankView) -> str:
    """`d0 p1 t1`: replica, stage and tensor rank, those that there are several of."""
    at = rank.at
    named = [
        ("d", at.data, sizes.data),
        ("p", at.pipeline, sizes.pipeline),
        ("r", at.ring, sizes.ring),
        ("u", at.ulysses, sizes.ulysses),
        ("t", at.tensor, sizes.tensor),
    ]
    return " ".join(f"{letter}{place}" for letter, place, of in named if of > 1)


def colour(sizes: GridSizes, rank: RankView) -> str:
    """A rank's colour class: by its place in the replica."""
    return f"c{sizes.replica_rank(rank.at) % NUM_COLOURS}"
