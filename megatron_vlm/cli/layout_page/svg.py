"""The few SVG shapes the figures are made of, as text. Colours are classes, which the page's style sheet fills in.

Everything is drawn WIDTH wide; the page scales it. A shape's `title` is what a browser shows when it is pointed at.
"""

from collections.abc import Iterable
from html import escape

WIDTH = 1180
LABELS = 136  # room for the ranks' names, left of every figure
ROW, GAP = 24, 6  # height of a rank's row, and between two
REPLICA_GAP = 16  # between replicas, more than between ranks


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "", radius: float = 2) -> str:
    """A box; nothing where it has no width."""
    if width <= 0:
        return ""
    shape = f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" rx="{radius}" class="{css}"'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def polygon(points: Iterable[tuple[float, float]], css: str, title: str) -> str:
    """A filled shape by its corners."""
    corners = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<polygon points="{corners}" class="{css}"><title>{escape(title)}</title></polygon>'


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """Words on a baseline."""
    return f'<text x="{x:.2f}" y="{y:.2f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str = "rule") -> str:
    """A straight line."""
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" class="{css}"/>'


def figure(shapes: Iterable[str], height: float, name: str) -> str:
    """The drawing, as an element of the page, in a box of its own that scrolls where a screen is too narrow to read it;
    `name` is read out to those who do not see it."""
    drawn = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}">{"".join(shapes)}</svg>'
    return f'<div class="figure">{drawn}</div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Swatches: (colour class, words)."""
    items = "".join(
        f'<span><svg viewBox="0 0 12 12" class="swatch">{rect(0, 0, 12, 12, css)}</svg>{escape(words)}</span>'
        for css, words in entries
    )
    return f'<div class="legend">{items}</div>'


def si(number: float, unit: str = "") -> str:
    """12,345,678 -> `12.3 M`."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{_three_digits(number / factor)} {letter}{unit}"
    return f"{_three_digits(number)} {unit}".strip()


def size(number: float) -> str:
    """Bytes in binary units: `1.5 GiB`."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """Parameters: `7.06 B`, as one says it of models."""
    return si(number).replace("G", "B")


def ticks(most: float, about: int, steps: tuple[float, ...] = (1, 2, 2.5, 5, 10)) -> list[float]:
    """0 and round numbers up to `most`, about so many."""
    if most <= 0:
        return [0.0]
    rough = most / about
    power = 10.0 ** (len(str(int(rough))) - 1) if rough >= 1 else 1.0
    while power > rough:
        power /= 10
    step = min((step * power for step in steps), key=lambda one: abs(one - rough))
    return [step * number for number in range(int(most / step + 1e-9) + 1)]


def binary_ticks(most: float, about: int) -> list[float]:
    """The same in bytes: round numbers of the binary unit that `most` is told in."""
    unit = max((2**power for power in (0, 10, 20, 30, 40) if 2**power <= max(most, 1)), default=1)
    return [tick * unit for tick in ticks(most / unit, about)]


def _three_digits(number: float) -> str:
    digits = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    rounded = f"{number:.{digits}f}"
    return rounded.rstrip("0").rstrip(".") if "." in rounded else rounded
