"""A step in time, a row per rank: encode, exchange, the pipeline's passes, the encoder's backward, the update.

Lengths are matrix FLOPs; the exchange and the update, which are none, get a fixed width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vlm.planner.layout import LayoutView
from megatron_vlm.planner.step_time import StepTime, WindowTime
from megatron_vlm.planner.timeline import TimedPass

from .rows import Row, labels, left_out, place
from .svg import GAP, LABELS, ROW, WIDTH, figure, rect, si, text

MOST_ROWS, MOST_PASSES = 16, 3000
EXCHANGE, UPDATE = 7.0, 22.0  # widths
HEADER = 24
DIGIT = 6.6  # width of one in a pass


@dataclass(frozen=True)
class Scale:
    """Scale from FLOPs of a window to places on the page."""

    left: float
    per_flop: float

    def width(self, flops: float) -> float:
        """Width of so many FLOPs."""
        return flops * self.per_flop


def num_windows_drawn(view: LayoutView) -> int:
    """All where the passes can be told apart, else the first."""
    rows = place(view, most=MOST_ROWS)[0]
    windows = view.times[0].windows
    passes = len(rows) * sum(
        2 * len(window.micro_batches) * view.config.parallel.virtual_pipeline for window in windows
    )
    return len(windows) if passes <= MOST_PASSES else 1


def note(view: LayoutView) -> str:
    """The note on what is left out of the drawing, as sentences."""
    drawn, all_windows = num_windows_drawn(view), len(view.times[0].windows)
    window = "" if drawn == all_windows else f" Drawn: the first of {all_windows} media windows."
    return window + left_out(view, MOST_ROWS)


def timeline(view: LayoutView) -> str:
    """The step of every rank drawn."""
    rows, bottom = place(view, top=HEADER, most=MOST_ROWS)
    drawn = num_windows_drawn(view)
    shapes = list(labels(view, rows))
    length = max(_length(time, drawn) for time in view.times)
    exchanges = drawn * (2 if any(max(one.encoder_backward) for time in view.times for one in time.windows) else 1)
    per_flop = (WIDTH - LABELS - exchanges * EXCHANGE - UPDATE) / length
    for number, time in enumerate(view.times):
        own = [row for row in rows if row.rank.at.data == number]
        if own:
            shapes += _replica(view, own, time.windows[:drawn], per_flop, number == 0)
    return figure(shapes, bottom + GAP, "the step in time")


def _length(time: StepTime, num_windows: int) -> float:
    return sum(window.length for window in time.windows[:num_windows])


def _replica(
    view: LayoutView, rows: Sequence[Row], windows: Sequence[WindowTime], per_flop: float, headed: bool
) -> Iterator[str]:
    left, top, bottom = float(LABELS), rows[0].y, rows[-1].y + ROW
    for number, window in enumerate(windows):
        scale = Scale(left, per_flop)
        encode = scale.width(max(window.encode))
        first = left + encode + EXCHANGE
        end = first + scale.width(window.pipeline.length)
        last = end + (EXCHANGE if max(window.encoder_backward) else 0)
        for row in rows:
            yield from _row(view, row, window, scale, (first, last))
        yield rect(first - EXCHANGE + 1.5, top, EXCHANGE - 3, bottom - top, "exchange",
                   "exchange: feature rows travel to the owners of their tokens (not to scale)")  # fmt: skip
        if max(window.encoder_backward):
            yield rect(end + 1.5, top, EXCHANGE - 3, bottom - top, "exchange",
                       "exchange: the rows' gradients travel back (not to scale)")  # fmt: skip
        back = last + scale.width(max(window.encoder_backward))
        if headed:
            yield from _header((left, first - EXCHANGE, end, last, back), number, len(windows))
        left = back
    for row in rows:
        yield rect(left, row.y, WIDTH - UPDATE - left, ROW, "idle", "waits for the other replicas")
    title = "update: gradients are reduced over the replicas, the optimizer steps (not to scale)"
    yield rect(WIDTH - UPDATE + 3, top, UPDATE - 3, bottom - top, "update", title)


def _header(edges: tuple[float, float, float, float, float], number: int, of: int) -> Iterator[str]:
    """Names over the phases that are wide enough for them."""
    left, first, end, last, back = edges
    pipeline = "pipeline" if of == 1 else f"pipeline, window {number + 1}"
    for name, start, stop in (("encode", left, first), (pipeline, first, end), ("encoder backward", last, back)):
        if stop - start > 8 * len(name):
            yield text((start + stop) / 2, HEADER - 10, name, "head", "middle")


def _row(view: LayoutView, row: Row, window: WindowTime, scale: Scale, edges: tuple[float, float]) -> Iterator[str]:
    rank, (first, last) = row.rank, edges
    place_in_replica = view.sizes.replica_rank(rank.at)
    encode, back = window.encode[place_in_replica], window.encoder_backward[place_in_replica]
    longest, longest_back = scale.width(max(window.encode)), scale.width(max(window.encoder_backward))
    yield rect(scale.left, row.y, longest, ROW, "idle", "waits for the others to encode")
    yield rect(scale.left, row.y, scale.width(encode), ROW, "encode", f"rank {rank.rank} encodes: {_flops(encode)}")
    yield rect(first, row.y, scale.width(window.pipeline.length), ROW, "idle", "bubble: the stage waits")
    for one in window.pipeline.passes:
        if one.stage == rank.at.pipeline:
            yield from _pass(view, row, window, one, first + one.start * scale.per_flop, scale)
    yield rect(last, row.y, longest_back, ROW, "idle", "waits for the others' encoder backward")
    title = f"rank {rank.rank}: the encoder's backward, {_flops(back)}"
    yield rect(last, row.y, scale.width(back), ROW, "encode-back", title)


def _pass(view: LayoutView, row: Row, window: WindowTime, one: TimedPass, x: float, scale: Scale) -> Iterator[str]:
    width = scale.width(one.end - one.start)
    number = window.micro_batches.start + one.run.micro_batch
    chunk = row.rank.chunks[one.run.chunk]
    kind = "forward" if one.run.forward else "backward"
    layers = f"layers {chunk.layers.start}\u2013{chunk.layers.stop - 1}"
    title = f"rank {row.rank.rank}: {kind} of micro-batch {number}, {layers}, {_flops(one.end - one.start)}"
    yield rect(x + 0.4, row.y, width - 0.8, ROW, f"{kind} k{min(one.run.chunk, 3)}", title)
    if width >= DIGIT * len(str(number)) + 2:
        yield text(x + width / 2, row.y + 16, str(number), "inside small", "middle")


def _flops(flops: float) -> str:
    return si(flops, "FLOP")
