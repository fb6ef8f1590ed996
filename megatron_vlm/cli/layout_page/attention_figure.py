"""The parts of a row's attention by rank: the rectangles of queries and keys, by ring rank and step."""

from collections.abc import Iterator

from megatron_vlm.parallel.layout import Block
from megatron_vlm.planner.layout import LayoutView

from .rows import NUM_COLOURS
from .svg import LABELS, WIDTH, figure, legend, line, polygon, text

SIDE = 560  # of the square of all queries and keys
TOP = 22
TABLE = LABELS + SIDE + 60
LINE = 26


def words(view: LayoutView) -> str:
    """The caption."""
    shown = view.shown
    documents = len(shown.row.packed) or 1
    rows = f"One row of {shown.row.num_tokens:,} tokens in {documents} document{'s' if documents > 1 else ''}"
    windows = [window for window in view.windows if window is not None and window < shown.row.num_tokens]
    sliding = f" {len(windows)} of {len(view.windows)} layers have a window of {windows[0]:,} tokens" if windows else ""
    return (
        f"{rows}: queries downwards, keys to the right. A part has the colour of the ring rank that computes it: "
        "at step 0 with its own keys, paler at every later step with keys that another rank has sent. What causality "
        f"or a document's end hides is neither computed nor sent.{sliding and f'{sliding}, which hides more.'}"
    )


def attention(view: LayoutView) -> str:
    """The square, and beside it the pairs by ring rank and step."""
    length = view.batch.layout.length
    scale = SIDE / length
    shapes = [line(LABELS, TOP, LABELS, TOP + SIDE), line(LABELS, TOP + SIDE, LABELS + SIDE, TOP + SIDE)]
    for rank, steps in enumerate(view.shown.blocks):
        for step, blocks in enumerate(steps):
            for block in blocks:
                shapes.append(_part(block, rank, step, len(steps), scale))
    for number in range(5):
        position = round(length * number / 4)
        shapes.append(
            text(LABELS + position * scale, TOP - 8, f"{position:,}", "quiet", "middle" if number else "start")
        )
        shapes.append(text(LABELS - 10, TOP + position * scale + 4, f"{position:,}", "quiet", "end"))
    shapes += _pairs(view)
    entries = [(f"c{rank % NUM_COLOURS}", f"ring rank {rank}") for rank in range(len(view.shown.blocks))]
    return legend(entries) + figure(shapes, TOP + SIDE + 8, "who computes which part of attention")


def _part(block: Block, rank: int, step: int, num_steps: int, scale: float) -> str:
    """The visible pairs of a block: its rectangle, cut along the diagonal where that hides keys."""
    top, bottom = block.queries.start, block.queries.stop
    left, right = block.keys.start, block.keys.stop
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if block.hides_future:  # along the diagonal from the first query's last key to the last key's first query
        corners = [(left, top), (min(top, right), top), (right, min(right, bottom)), (right, bottom), (left, bottom)]
    shade = "" if step == 0 else f" s{1 + 2 * (step - 1) // max(1, num_steps - 1)}"
    title = (
        f"ring rank {rank}, step {step}: queries {top:,} to {bottom - 1:,} with keys {left:,} to {right - 1:,}, "
        f"{block.pairs:,} pairs"
    )
    points = [(LABELS + x * scale, TOP + y * scale) for x, y in corners]
    return polygon(points, f"part c{rank % NUM_COLOURS}{shade}", title)


def _pairs(view: LayoutView) -> Iterator[str]:
    pairs, imbalance = view.shown.pairs, view.shown.imbalance
    yield text(TABLE, TOP + 12, "query-key pairs", "head")
    column = min(96.0, (WIDTH - TABLE - 70) / (len(pairs) + 1))
    fits = column >= 60
    names = [*(f"step {number}" for number in range(len(pairs))), "together"] if fits else ["together"]
    for number, name in enumerate(names):
        yield text(TABLE + 70 + (number + 1) * column * (1 if fits else 1.5), TOP + 12 + LINE, name, "quiet", "end")
    for rank, of_rank in enumerate(pairs):
        y = TOP + 12 + (rank + 2) * LINE
        yield text(TABLE, y, f"ring {rank}", "name")
        for number, amount in enumerate((*of_rank, sum(of_rank)) if fits else (sum(of_rank),)):
            yield text(TABLE + 70 + (number + 1) * column * (1 if fits else 1.5), y, f"{amount:,}", "number", "end")
    yield text(TABLE, TOP + 12 + (len(pairs) + 2.4) * LINE, f"most over the mean: {imbalance:.3f}", "quiet")
