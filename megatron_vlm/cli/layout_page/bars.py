"""Stacked bars by rank: the memory each needs, and the bytes each sends."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.planner.layout import LayoutView, RankView

from .rows import labels, place
from .svg import GAP, LABELS, ROW, WIDTH, binary_ticks, figure, legend, line, rect, size, text

TOTALS = 92  # room for the sums, right of the bars


@dataclass(frozen=True)
class Part:
    """A kind of bytes: colour class, words, and the number on a rank."""

    css: str
    words: str
    bytes_on: dict[int, int]  # by rank


def memory(view: LayoutView) -> str:
    """Bars of each rank's memory at its fullest."""
    return _bars(view, _memory_parts(view.ranks), "memory each rank needs")


def traffic(view: LayoutView) -> str:
    """Bars of the bytes that each rank sends in a step."""
    return _bars(view, _traffic_parts(view.ranks), "bytes each rank sends in a step")


def _memory_parts(ranks: Sequence[RankView]) -> list[Part]:
    rest = {one.rank: one.memory.peak - one.memory.model - one.memory.features - one.memory.vision_activations
            for one in ranks}  # fmt: skip
    pipeline = {one.rank: one.memory.activations + one.memory.loss_head >= rest[one.rank] for one in ranks}
    table = (
        ("m0", "language parameters", {one.rank: one.memory.language.parameters for one in ranks}),
        ("m1", "their gradients", {one.rank: one.memory.language.gradients for one in ranks}),
        ("m2", "their optimizer state", {one.rank: one.memory.language.optimizer_state for one in ranks}),
        ("m3", "encoder, all three", {one.rank: sum(vars(one.memory.vision).values()) for one in ranks}),
        ("m4", "encoder activations", {one.rank: one.memory.vision_activations for one in ranks}),
        ("m5", "features of a window", {one.rank: one.memory.features for one in ranks}),
        ("m6", "activations", {one.rank: one.memory.activations if pipeline[one.rank] else 0 for one in ranks}),
        ("m7", "loss head", {one.rank: one.memory.loss_head if pipeline[one.rank] else 0 for one in ranks}),
        ("m8", "encoding", {one.rank: 0 if pipeline[one.rank] else rest[one.rank] for one in ranks}),
    )
    return [Part(*entry) for entry in table]


def _traffic_parts(ranks: Sequence[RankView]) -> list[Part]:
    table = (
        ("m0", "tensor ranks: hidden states", {one.rank: one.traffic.tensor for one in ranks}),
        ("m4", "context ranks: attention", {one.rank: one.traffic.attention for one in ranks}),
        ("m2", "pipeline: hidden states and gradients", {one.rank: one.traffic.pipeline for one in ranks}),
        ("m1", "replicas: language gradients, parameters", {one.rank: one.traffic.data_language for one in ranks}),
        ("m3", "world: encoder gradients, parameters", {one.rank: one.traffic.data_vision for one in ranks}),
        ("m5", "feature rows out", {one.rank: one.traffic.features for one in ranks}),
        ("m6", "feature gradients back", {one.rank: one.traffic.feature_gradients for one in ranks}),
    )
    return [Part(*entry) for entry in table]


def _bars(view: LayoutView, parts: Sequence[Part], name: str) -> str:
    rows, bottom = place(view)
    parts = [part for part in parts if any(part.bytes_on[row.rank.rank] for row in rows)]
    most = max(sum(part.bytes_on[row.rank.rank] for part in parts) for row in rows) if parts else 0
    scale = (WIDTH - LABELS - TOTALS) / max(1, most)
    shapes = []
    for tick in binary_ticks(most, 8):
        x = LABELS + tick * scale
        shapes.append(line(x, 0, x, bottom + GAP))
        shapes.append(text(x, bottom + GAP + 14, size(tick) if tick else "0", "quiet", "middle"))
    shapes += labels(view, rows)
    for row in rows:
        x, total = float(LABELS), 0
        for part in parts:
            number = part.bytes_on[row.rank.rank]
            shapes.append(rect(x, row.y, number * scale, ROW, part.css, f"{part.words}: {size(number)}", 0))
            x, total = x + number * scale, total + number
        shapes.append(text(x + 8, row.y + 16.5, size(total), "number"))
    return legend((part.css, part.words) for part in parts) + figure(shapes, bottom + GAP + 22, name)
