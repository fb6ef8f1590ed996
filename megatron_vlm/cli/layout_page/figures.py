"""The grid, the tokens and the images, drawn."""

from collections.abc import Iterator

from megatron_vlm.planner.batch import SampleRow
from megatron_vlm.planner.layout import LayoutView, RankView, fullest, shares_all

from .rows import Row, colour, labels, place, replicas_shown
from .svg import LABELS, ROW, WIDTH, count, figure, line, rect, size, text

BOX_HEIGHT, BOX_GAP = 76, 12
MOST_COLUMNS = 4  # boxes beside one another within a replica, and replicas beside one another
STRIP = 22  # the row of tokens above a replica's ranks
WIDEST_LETTER = 7.2  # of small text
SENT = 380  # width of the exchange's columns


def grid(view: LayoutView) -> str:
    """Each rank as a box: replicas beside one another, stages below one another, tensor ranks in a line."""
    sizes = view.sizes
    across = min(sizes.tensor * sizes.context, MOST_COLUMNS)
    beside = min(replicas_shown(sizes), max(1, MOST_COLUMNS // across))
    panel = (WIDTH - 24 * (beside - 1)) / beside
    lines = -(-sizes.tensor * sizes.context // across)  # of one stage
    panel_height = 34 + sizes.pipeline * lines * (BOX_HEIGHT + BOX_GAP) + 4
    shapes: list[str] = []
    for data in range(replicas_shown(sizes)):
        x, y = (data % beside) * (panel + 24), (data // beside) * (panel_height + 20)
        shapes.append(rect(x, y, panel, panel_height, "panel", radius=10))
        shapes.append(text(x + 16, y + 23, f"replica {data}", "name"))
        shapes.append(text(x + panel - 16, y + 23, "its own rows of every batch", "quiet", "end"))
        width = (panel - 32 - BOX_GAP * (across - 1)) / across
        for number, rank in enumerate(view.replica(data)):
            left = x + 16 + (number % across) * (width + BOX_GAP)
            shapes += _box(view, rank, left, y + 36 + (number // across) * (BOX_HEIGHT + BOX_GAP), width)
    height = -(-replicas_shown(sizes) // beside) * (panel_height + 20) - 20
    return figure(shapes, height, "the grid of ranks")


def _box(view: LayoutView, rank: RankView, x: float, y: float, width: float) -> Iterator[str]:
    ends = [name for name, there in (("embedding", any(c.first for c in rank.chunks)),
                                     ("head", any(c.last for c in rank.chunks))) if there]  # fmt: skip
    held = f"layers {rank.layers}"
    share = f"1/{view.sizes.tensor} of " if view.sizes.tensor > 1 else ""
    title = (
        f"rank {rank.rank}: {share}{' and '.join([held, *ends])}; the whole encoder; {rank.num_parameters:,} numbers"
    )
    yield rect(x, y, width, BOX_HEIGHT, "card", title, 6)
    yield rect(x, y, 5, BOX_HEIGHT, colour(view.sizes, rank), radius=2)
    yield text(x + 18, y + 22, f"rank {rank.rank}", "name")
    yield text(x + width - 12, y + 22, _place_name(view, rank), "quiet", "end")
    yield text(x + 18, y + 43, f"layers {rank.layers}")
    yield text(x + 18, y + 62, " \u00b7 ".join([f"{count(rank.num_parameters)} parameters", *ends]), "quiet")


def _place_name(view: LayoutView, rank: RankView) -> str:
    sizes, words = view.sizes, []
    if sizes.pipeline > 1:
        words.append(f"stage {rank.at.pipeline}")
    if sizes.context > 1:
        words.append(f"context {rank.at.ulysses + sizes.ulysses * rank.at.ring}")
    if sizes.tensor > 1:
        words.append(f"tensor {rank.at.tensor}")
    return " \u00b7 ".join(words)


def tokens(view: LayoutView) -> str:
    """Above each replica one of its rows; below, what each rank owns of every row."""
    rows, bottom = place(view, top=20, above=STRIP + 12)
    length = view.batch.layout.length
    scale = (WIDTH - LABELS) / length
    shapes = list(labels(view, rows))
    for row in rows:
        if row.rank.rank == view.sizes.replica_ranks(row.rank.at.data)[0]:
            shapes += _sample(view, fullest(view.batch.replicas[row.rank.at.data]), row.y - STRIP - 8, scale)
        shapes.append(rect(LABELS, row.y + 3, length * scale, ROW - 6, "track"))
        for first, end in row.rank.tokens:
            title = f"rank {row.rank.rank} owns tokens {first:,} to {end - 1:,} of every row of its replica"
            css = colour(view.sizes, row.rank) + (" faint" if row.rank.at.pipeline else "")
            shapes.append(rect(LABELS + first * scale, row.y, (end - first) * scale, ROW, css, title, 3))
            if (end - first) * scale > 130:
                words, ink = f"{first:,} \u2013 {end - 1:,}", "" if row.rank.at.pipeline else "inside"
                shapes.append(text(LABELS + first * scale + 10, row.y + 16.5, words, ink))
    for number in range(5):
        position = round(length * number / 4)
        anchor = "start" if number == 0 else "end" if number == 4 else "middle"
        shapes.append(text(LABELS + position * scale, 12, f"{position:,}", "quiet", anchor))
    return figure(shapes, bottom + 2, "who owns which tokens")


def _sample(view: LayoutView, sample: SampleRow, y: float, scale: float) -> Iterator[str]:
    length, each = view.batch.layout.length, view.batch.tokens_per_image
    yield text(12, y + 15, "one of its rows", "quiet")
    yield rect(LABELS, y, length * scale, STRIP - 2, "padding", f"padding: {length - sample.num_tokens:,} tokens", 3)
    yield rect(LABELS, y, sample.num_tokens * scale, STRIP - 2, "text", f"{sample.num_tokens:,} tokens", 3)
    for start in sample.documents(length).starts[1:]:
        yield line(LABELS + start * scale, y - 4, LABELS + start * scale, y + STRIP + 2, "seam")
    for number, start in enumerate(sample.image_starts):
        title = f"image {number + 1}: tokens {start:,} to {start + each - 1:,}"
        yield rect(LABELS + start * scale, y, each * scale, STRIP - 2, "image", title, 3)
        if each * scale > 60:
            yield text(LABELS + (start + each / 2) * scale, y + 14.5, "image", "inside", "middle")


def images(view: LayoutView) -> str:
    """Left what each rank encodes in a step, right where the rows go: one column per owner of tokens."""
    rows, bottom = place(view, top=40)
    shapes = list(labels(view, rows))
    most = max(row.rank.num_images for row in rows)
    room = WIDTH - LABELS - SENT - 120
    step = min(22.0, room / max(1, most))
    shapes.append(text(LABELS, 14, "images it encodes", "head"))
    left = WIDTH - SENT
    shapes.append(text(left, 14, "feature rows it sends to each owner of tokens", "head"))
    owners = view.owners(0)
    cell = (SENT - 96) / len(owners)
    for number, owner in enumerate(owners):
        name = _owner_name(view, owner)
        if _fits(name, cell):
            shapes.append(text(left + (number + 0.5) * cell, 32, name, "quiet", "middle"))
    shapes.append(text(WIDTH, 32, "to others", "quiet", "end"))
    for row in rows:
        shapes += _tiles(view, row, step)
        shapes += _cells(view, row, left, cell)
    return figure(shapes, bottom + 2, "who encodes which image")


def _owner_name(view: LayoutView, owner: RankView) -> str:
    """`d0 c1 t0`, those axes that it may differ in."""
    sizes, at = view.sizes, owner.at
    several = shares_all(view.config) and sizes.data > 1
    context = at.ulysses + sizes.ulysses * at.ring
    named = (("d", at.data, several), ("c", context, sizes.context > 1), ("t", at.tensor, sizes.tensor > 1))
    return " ".join(f"{letter}{place}" for letter, place, differs in named if differs) or "own"


def _fits(words: str, width: float) -> bool:
    return width >= WIDEST_LETTER * len(words) + 4


def _tiles(view: LayoutView, row: Row, step: float) -> Iterator[str]:
    x, css = float(LABELS), colour(view.sizes, row.rank)
    yield line(LABELS, row.y + ROW, WIDTH - SENT - 24, row.y + ROW)
    for window, plan in enumerate(view.batch.replicas[row.rank.at.data].plans):
        for number in plan.items_of(plan.media_rank(row.rank.at)):
            item = plan.items[number]
            whose = "" if item.data == row.rank.at.data else f"replica {item.data}'s "
            title = (
                f"an image of {whose}micro-batch {item.micro_batch}, row {item.row}: tokens {item.start:,} to "
                f"{item.start + item.num_tokens - 1:,} (window {window})"
            )
            faint = " faint" if window % 2 else ""
            yield rect(x, row.y + 3, step - min(2.0, step / 4), ROW - 6, css + faint, title)
            x += step
    yield text(x + 8, row.y + 16.5, str(row.rank.num_images), "quiet")


def _cells(view: LayoutView, row: Row, left: float, cell: float) -> Iterator[str]:
    owners = view.owners(row.rank.at.data)
    most = max(max(line) for sent in view.rows_sent for line in sent) or 1
    for number, owner in enumerate(owners):
        num_rows = view.rows_to(row.rank, owner)
        stays = owner.rank == row.rank.rank
        where = "stay here" if stays else f"go to rank {owner.rank}"
        x = left + number * cell
        yield rect(x, row.y, cell - 4, ROW, "track", f"{num_rows:,} feature rows {where}", 3)
        shade = f"heat h{1 + round(9 * num_rows / most)}" if num_rows else ""
        if shade:
            yield rect(x, row.y, cell - 4, ROW, shade, f"{num_rows:,} feature rows {where}", 3)
        words = f"{num_rows:,}" + (" (own)" if stays and cell > 90 else "")
        if num_rows and _fits(words, cell):
            yield text(x + cell / 2 - 2, row.y + 16.5, words, "inside" if num_rows > 0.45 * most else "", "middle")
    yield text(WIDTH, row.y + 16.5, size(row.rank.traffic.features), "number", "end")
