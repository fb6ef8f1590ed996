"""Results of the attention benchmark, told: table, JSON, drawing, a section for docs/benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from .. import report
from .names import PACKED, PRODUCT, TURNS, WHOLE

MEBIBYTE = 2**20


def tell(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the table and writes the files asked for."""
    result |= summary(result)
    report.keep(result, markdown(result), arguments)
    if arguments.png is not None:
        arguments.png.parent.mkdir(parents=True, exist_ok=True)
        draw(result, arguments.png)
    for row in rows(result):
        print(" | ".join(row))
    for line in lines(result):
        print(line)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Ratios of a run. In turn: the least share of the ideal on the longest rows of one document. Exchanged: the best
    other's time over our fastest layout's, the least over the lengths; None where no other runs."""
    if result["measured"] == TURNS:
        longest = max(cell["tokens"] for cell in result["cells"])
        cells = [one for one in result["cells"] if one["tokens"] == longest and one["rows"] == WHOLE]
        return {"least_share_of_ideal": min(cell["share_of_ideal"] for cell in cells)}
    ratios = []
    for length in {cell["tokens"] for cell in result["cells"]}:
        cells = [one for one in result["cells"] if one["tokens"] == length and one["rows"] == WHOLE]
        ours = [_both(one) for one in cells if one["side"] == PRODUCT]
        theirs = [_both(one) for one in cells if one["side"] != PRODUCT]
        ratios += [min(theirs) / min(ours)] if theirs else []
    return {"ratio": min(ratios, default=None)}


def _both(cell: dict[str, Any]) -> float:
    return float(sum(cell["slowest_rank_seconds"].values()))


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A heading and a line per cell."""
    return _rows_in_turn(result["cells"]) if result["measured"] == TURNS else _rows_exchanged(result["cells"])


def _rows_in_turn(cells: list[dict[str, Any]]) -> list[list[str]]:
    table = [["tokens", "row", "ulysses x ring", "sent per rank, MiB: forward, backward", "pairs per rank, millions",
              "max / mean", "slowest rank, s: forward, backward", "one device, s", "share of the ideal"]]  # fmt: skip
    for cell in cells:
        sent = ", ".join(f"{cell[f'sent_{way}_bytes'] / MEBIBYTE:.2f}" for way in ("forward", "backward"))
        slowest = cell["slowest_rank_seconds"]
        table.append(
            [
                f"{cell['tokens']:,}",
                _row_words(cell),
                f"{cell['ulysses']} x {cell['ring']}",
                sent,
                f"{cell['pairs_per_rank'] / 1e6:,.1f}",
                f"{cell['imbalance_of_pairs']:.3f}",
                f"{slowest['forward']:.4f}, {slowest['backward']:.4f}",
                f"{sum(cell['single_device_seconds'].values()):.4f}",
                f"{cell['share_of_ideal']:.1%}",
            ]
        )
    return table


def _rows_exchanged(cells: list[dict[str, Any]]) -> list[list[str]]:
    table = [["tokens", "row", "side", "ulysses x ring", "slowest rank, s: forward, backward"]]
    for cell in cells:
        seconds = ", ".join(f"{cell['slowest_rank_seconds'][way]:.4f}" for way in ("forward", "backward"))
        table.append(
            [
                f"{cell['tokens']:,}",
                _row_words(cell),
                cell["side"],
                f"{cell['ulysses']} x {cell['ring']}",
                seconds,
            ]
        )
    return table


def _row_words(cell: dict[str, Any]) -> str:
    return f"{cell['documents']} documents" if cell["rows"] == PACKED else WHOLE


def lines(result: dict[str, Any]) -> list[str]:
    """Lines below the table."""
    told = [f"measured: {result['measured']}"]
    if "least_share_of_ideal" in result:
        told.append(
            f"least share of the ideal on the longest rows of one document: {result['least_share_of_ideal']:.1%}"
        )
    elif result["ratio"] is not None:
        told.append(f"ratio {result['ratio']:.2f}: the fastest other's time over our fastest layout's, the least")
    return told + [f"{name}: {reason}" for name, reason in result["others"].items()]


def markdown(result: dict[str, Any]) -> str:
    """A section for docs/benchmarks."""
    shape = result["shape"]
    heading, *body = rows(result)
    return "\n".join(
        [
            f"\n### {result['world_size']} process(es): {result['measured']}\n",
            report.origin(result)
            + f"; {shape['heads']} query heads, {shape['kv_heads']} key heads of {shape['width']}, {shape['dtype']}; "
            f"{result['threads_per_rank']} thread(s) per rank; fastest of {result['rounds']} rounds.\n",
            f"    {result['command']}\n",
            *("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *body)),
            "",
            *(f"- {line}" for line in lines(result)),
            "",
        ]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Efficiency over length: a panel per number of ranks and kind of row, a line per layout.

    Exchanged: seconds, and a line per side's layout.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    in_turn = result["measured"] == TURNS
    cells = result["cells"]
    lengths = sorted({cell["tokens"] for cell in cells})
    kinds, sizes = (WHOLE, PACKED), sorted({cell["ulysses"] * cell["ring"] for cell in cells})
    figure, grid = pyplot.subplots(
        len(kinds), len(sizes), figsize=(4 * len(sizes) + 1, 6.4), squeeze=False, sharex=True, sharey=in_turn,
        layout="constrained",
    )  # fmt: skip
    for line, kind in enumerate(kinds):
        for column, size in enumerate(sizes):
            panel = grid[line][column]
            here = [one for one in cells if one["rows"] == kind and one["ulysses"] * one["ring"] == size]
            for side, ulysses, ring in dict.fromkeys((c.get("side", ""), c["ulysses"], c["ring"]) for c in here):
                same = [c for c in here if (c.get("side", ""), c["ulysses"], c["ring"]) == (side, ulysses, ring)]
                heights = [100 * c["share_of_ideal"] if in_turn else _both(c) for c in same]
                words = f"{side} ulysses {ulysses} x ring {ring}".strip()
                panel.plot([c["tokens"] for c in same], heights, "o-", label=words)
            panel.set_title(f"{size} ranks, {kind}", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    for panel in grid[-1]:
        panel.set_xlabel("tokens of a row")
    for panel in grid[:, 0]:
        panel.set_ylabel("share of one device's time / ranks, %" if in_turn else "seconds, forward and backward")
        if in_turn:
            panel.set_ylim(0, 115)
    figure.suptitle(f"{result['machine']['device']}: {result['measured']}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
