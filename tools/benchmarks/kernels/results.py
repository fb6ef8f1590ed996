"""Results of the kernel benchmark, told: table, JSON, drawing, a section for docs/benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from megatron_vlm.ops.dispatch import TRITON

from .. import report
from . import targets

MEBIBYTE, TERA = 2**20, 1e12
PEAK = (
    "peak extra: most bytes allocated at a time above what was there before a pass in both directions, results and "
    "gradients included; what the weight's gradient of linear cross entropy is added to was there (ours: main_grad in "
    "fp32, the others': .grad)"
)
WAYS = ("forward", "backward")


def tell(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the table and writes the files asked for."""
    result["ratio"] = ratios(result["cells"])
    result["targets"] = targets.report(result)
    report.keep(result, markdown(result), arguments)
    if arguments.png is not None and result["cells"]:
        arguments.png.parent.mkdir(parents=True, exist_ok=True)
        draw(result, arguments.png)
    for row in rows(result):
        print(" | ".join(row))
    for line in [*map(targets.words, result["targets"]), *lines(result)]:
        print(line)


def words(sizes: Any) -> str:
    """{"tokens": 8192, "hidden": 4096} -> "8192 tokens, 4096 hidden"."""
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sizes.items())


def place(cell: dict[str, Any]) -> str:
    """Operation and size, in words."""
    return f"{cell['op']} {words(cell['sizes'])}"


def short(cell: dict[str, Any]) -> str:
    """A cell in a line, before the run is over."""
    times = ", ".join(f"{way} {cell[way]['seconds'] * 1e6:,.1f} us" for way in WAYS)
    return f"{place(cell)}: {cell['side']}: {times}; error {_error_words(cell)}"


def both(cell: dict[str, Any]) -> float:
    """Seconds forward and backward."""
    return float(sum(cell[way]["seconds"] for way in WAYS))


def ratios(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios by operation and size: the fastest other side's time over our kernel's, forward and backward."""
    found = {}
    for ours in (cell for cell in cells if cell["side"] == TRITON):
        theirs = [both(cell) for cell in cells if place(cell) == place(ours) and cell["side"] != TRITON]
        if theirs:
            found[place(ours)] = min(theirs) / both(ours)
    return found


def ceiling_seconds(one_way: dict[str, Any], ceilings: dict[str, float]) -> tuple[float, bool]:
    """The least time of a pass on this machine, and whether it is the products that take it."""
    traffic = one_way["bytes"] / ceilings["bytes_per_second"]
    products = one_way["flops"] / ceilings["flops_per_second"]
    return max(traffic, products), products > traffic


def share(cell: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Share of the ceiling, forward and backward together."""
    return sum(ceiling_seconds(cell[way], ceilings)[0] for way in WAYS) / both(cell)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A heading and a line per cell."""
    table = [["operation", "side", "forward, us", "backward, us", "rate: forward, backward",
              "share of the ceiling: forward, backward", "peak extra, MiB", "error (plain torch's)"]]  # fmt: skip
    ceilings = result["ceilings"]
    for cell in result["cells"]:
        rates, shares = [], []
        for way in WAYS:
            least, by_products = ceiling_seconds(cell[way], ceilings)
            if not least:
                rates.append("-")
                shares.append("-")
                continue
            seconds, done = cell[way]["seconds"], cell[way]["flops" if by_products else "bytes"]
            rates.append(f"{done / seconds / TERA:.3g} {'TFLOP/s' if by_products else 'TB/s'}")
            shares.append(f"{least / seconds:.0%}")
        peak = cell["peak_extra_bytes"]
        table.append(
            [
                place(cell),
                cell["side"],
                *(f"{cell[way]['seconds'] * 1e6:,.1f}" for way in WAYS),
                ", ".join(rates),
                ", ".join(shares),
                "-" if peak is None else f"{peak / MEBIBYTE:,.1f}",
                _error_words(cell),
            ]
        )
    return table


def _error_words(cell: dict[str, Any]) -> str:
    if "error" not in cell:
        return "-"
    return f"{cell['error']:.1e} ({cell['plain_error']:.1e})" + ("" if cell["exact_enough"] else " TOO LARGE")


def lines(result: dict[str, Any]) -> list[str]:
    """Lines below the table."""
    ceilings = result["ceilings"]
    told = [
        f"ceilings, measured in this run: a copy {ceilings['bytes_per_second'] / TERA:.3g} TB/s, a matrix product "
        f"{ceilings['flops_per_second'] / TERA:.3g} TFLOP/s ({result['dtype']})"
    ]
    if any(cell["peak_extra_bytes"] is not None for cell in result["cells"]):
        told.append(PEAK)
    told += [
        f"{where}: ratio {ratio:.2f}, the fastest other's time over {TRITON}'s"
        for where, ratio in result["ratio"].items()
    ]
    if result["tiny"]:
        told.append("tiny sizes: a rehearsal, whose times mean nothing")
    return told + [f"{where}: {reason}" for where, reason in result["others"].items()]


def target_rows(result: dict[str, Any]) -> list[list[str]]:
    """A heading and a line per target."""
    table = [["target", "needed", "found", "outcome"]]
    for line in result["targets"]:
        found = "-" if line["found"] is None else f"{line['found']:.3g}"
        reason = f": {line['reason']}" if line["reason"] else ""
        table.append([line["target"], line["needed"], found, line["outcome"] + reason])
    return table


def markdown(result: dict[str, Any]) -> str:
    """A section for docs/benchmarks."""
    return "\n".join(
        [
            f"\n### kernels on {result['machine']['device']}\n",
            f"{report.origin(result)}; {result['dtype']}; medians of up to {result['rounds']} rounds.\n",
            f"    {result['command']}\n",
            *_table(rows(result)),
            "",
            *_table(target_rows(result)),
            "",
            *(f"- {line}" for line in lines(result)),
            "",
        ]
    )


def _table(lines: list[list[str]]) -> list[str]:
    heading, *body = lines
    return ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *body)]


def draw(result: dict[str, Any], path: Path) -> None:
    """Share of the ceiling, forward and backward together: a panel per operation, a group per size, a bar per side."""
    from matplotlib.figure import Figure

    cells, ceilings = result["cells"], result["ceilings"]
    operations = list(dict.fromkeys(cell["op"] for cell in cells))
    figure = Figure(figsize=(10, 2.6 * len(operations)), layout="constrained")
    for panel, op in zip(figure.subplots(len(operations), 1, squeeze=False)[:, 0], operations, strict=True):
        here = [cell for cell in cells if cell["op"] == op]
        groups = list(dict.fromkeys(words(cell["sizes"]) for cell in here))
        sides = list(dict.fromkeys(cell["side"] for cell in here))
        for number, side in enumerate(sides):
            same = [cell for cell in here if cell["side"] == side]
            at = [groups.index(words(cell["sizes"])) + 0.8 * (number - len(sides) / 2) / len(sides) for cell in same]
            heights = [100 * share(cell, ceilings) for cell in same]
            panel.bar(at, heights, width=0.75 / len(sides), align="edge", label=side)
        panel.set_xticks(range(len(groups)), groups, fontsize=8)
        panel.set_title(op, fontsize=10)
        panel.set_ylabel("% of the ceiling")
        panel.legend(fontsize=7, ncols=4)
    figure.suptitle(f"{result['machine']['device']}, {result['dtype']}", fontsize=11)
    figure.savefig(path, dpi=110)
