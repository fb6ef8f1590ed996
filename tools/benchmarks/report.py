"""Measurements, told: one dictionary, and from it a table, a JSON file, a drawing, a section for docs/benchmarks.

Times are medians over the rounds, with the least and the most beside them; a side's rates follow from its median time.
The ratio is the other side's median time over ours. The sides took turns, so what disturbed the machine for longer than
a round disturbed both.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vlm.config.schema import Config

from .training.sides import PRODUCT, TRANSFORMERS, Facts, Memory, Round

PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
GIBIBYTE, TERA = 2**30, 1e12


@dataclass(frozen=True)
class Measured:
    """Measurements of one side."""

    facts: Facts
    warm_up: Round
    rounds: list[Round]
    phases: Round  # one round more, with the device waited for at the end of every phase
    memory: list[Memory]  # by rank

    @property
    def losses(self) -> list[float]:
        """Losses of every step up to the last timed one."""
        return [loss for part in (self.warm_up, *self.rounds) for loss in part.losses]


def summarise(
    measured: dict[str, Measured], config: Config, world_size: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    facts = measured[PRODUCT].facts
    result: dict[str, Any] = header("throughput", facts.device) | {
        "recipe": arguments.recipe,
        "config": config.model_dump(mode="json"),
        "world_size": world_size,
        "threads_per_rank": facts.num_threads,
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "step": {
            "samples": facts.samples,
            "tokens": facts.tokens,
            "padding_tokens": facts.row_tokens - facts.tokens,
            "trained_tokens": facts.trained_tokens,
            "media": facts.media,
            "flops": facts.flops,
        },
        "peak": {"flops_per_second": facts.peak_flops, "source": facts.peak_source},
        "sides": {name: side(of_one, facts) for name, of_one in measured.items()},
    }
    if TRANSFORMERS in measured:
        result |= comparison(measured[PRODUCT], measured[TRANSFORMERS])
    return result


def header(benchmark: str, device: str) -> dict[str, Any]:
    """The origin that every result states. `device`: what it ran on, in words."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["tools/bench.py", *sys.argv[1:]]),
        "machine": machine(device),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def keep(result: dict[str, Any], section: str, arguments: argparse.Namespace) -> None:
    """Writes what --json and --markdown ask for: everything measured, and a section of docs/benchmarks, appended."""
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        with arguments.markdown.open("a") as file:
            file.write(section)


def origin(result: dict[str, Any]) -> str:
    """The same in a sentence, without the command."""
    host = result["machine"]
    return (
        f"{result['date']}, commit {result['commit']}; {host['device']} ({host['cpu']}, {host['cores']} cores, "
        f"{host['memory_bytes'] / GIBIBYTE:.0f} GiB); "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    )


def side(measured: Measured, facts: Any) -> dict[str, Any]:
    """One side's numbers. `facts`: the product's, who knows the FLOPs that a step needs."""
    seconds = spread([of_one.seconds for of_one in measured.rounds])
    median = seconds["median"]
    return {
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": spread([of_one.cpu_seconds for of_one in measured.rounds]),
        "tokens_per_second": facts.tokens / median,
        "samples_per_second": facts.samples / median,
        "model_flops_per_second": facts.flops / median,
        "mfu": facts.flops / median / facts.peak_flops,
        "phase_seconds": measured.phases.phase_seconds | {"data": measured.facts.data_seconds},
        "peak_memory_bytes": [of_rank.peak_bytes for of_rank in measured.memory],
        "memory_before_model_bytes": [of_rank.before_bytes for of_rank in measured.memory],
        "losses": measured.losses,
    }


def comparison(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """The ratio of the median times, that of each round, and that of the processors' time."""
    pairs = list(zip(ours.rounds, theirs.rounds, strict=True))
    losses = zip(ours.losses, theirs.losses, strict=True)
    return {
        "ratio": statistics.median(right.seconds for _, right in pairs)
        / statistics.median(left.seconds for left, _ in pairs),
        "ratio_of_rounds": spread([right.seconds / left.seconds for left, right in pairs]),
        "ratio_of_cpu_seconds": spread([right.cpu_seconds / left.cpu_seconds for left, right in pairs]),
        "largest_relative_loss_difference": max(abs(left - right) / abs(right) for left, right in losses),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least, most, and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of a folder\'s checkout, with `+` where files differ from it; None where there is no git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ":/")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: str) -> dict[str, Any]:
    """The machine it ran on."""
    import psutil

    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "device": device,
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table: a heading and a line per side."""
    table = [["side", "s/step (min..max)", "tokens/s", "samples/s", "TFLOP/s", "MFU", "peak memory per rank, GiB"]]
    for name, numbers in result["sides"].items():
        seconds = numbers["seconds_per_step"]
        table.append(
            [
                name,
                f"{seconds['median']:.3f} ({seconds['min']:.3f}..{seconds['max']:.3f})",
                f"{numbers['tokens_per_second']:,.0f}",
                f"{numbers['samples_per_second']:.2f}",
                f"{numbers['model_flops_per_second'] / TERA:.3g}",
                f"{numbers['mfu']:.1%}",
                ", ".join(f"{peak / GIBIBYTE:.2f}" for peak in numbers["peak_memory_bytes"]),
            ]
        )
    return table


def lines(result: dict[str, Any]) -> list[str]:
    """Lines below the table."""
    step, ours = result["step"], result["sides"][PRODUCT]
    told = [
        f"a step: {step['samples']} samples, {step['tokens']:,.0f} tokens of which {step['trained_tokens']:,.0f} are "
        f"trained, {step['media']:.0f} images; {result['world_size']} rank(s) of {result['threads_per_rank']} "
        f"thread(s); median of {result['rounds']} rounds of {result['steps_per_round']} steps",
        "megatron_vlm's step by phase, s: "
        + ", ".join(f"{name} {seconds:.3f}" for name, seconds in ours["phase_seconds"].items() if name != "data")
        + f"; making a batch, outside the step: {ours['phase_seconds']['data']:.3f}",
    ]
    if "ratio" in result:
        rounds, cpu = result["ratio_of_rounds"], result["ratio_of_cpu_seconds"]
        told.append(
            f"megatron_vlm is {result['ratio']:.2f} times as fast as transformers (round by round {rounds['min']:.2f} "
            f"to {rounds['max']:.2f}; by processor time {cpu['median']:.2f}); losses equal to "
            f"{result['largest_relative_loss_difference']:.1e} over {len(ours['losses'])} steps"
        )
    return told


def show(result: dict[str, Any]) -> None:
    """Prints table and lines."""
    from rich.table import Table

    from megatron_vlm.runtime.logging import stdout_console

    console = stdout_console()
    heading, *sides = rows(result)
    table = Table(*heading)
    for row in sides:
        table.add_row(*row)
    console.print(table)
    for line in lines(result):
        console.print(line)


def write(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The files asked for."""
    keep(result, markdown(result), arguments)
    if arguments.png is not None:
        arguments.png.parent.mkdir(parents=True, exist_ok=True)
        draw(result, arguments.png)


def markdown(result: dict[str, Any]) -> str:
    """A section for docs/benchmarks."""
    heading, *sides = rows(result)
    table = [heading, ["---"] * len(heading), *sides]
    return "\n".join(
        [
            f"\n### {Path(result['recipe']).stem}, {result['world_size']} rank(s)\n",
            f"{origin(result)}; MFU against {result['peak']['flops_per_second'] / TERA:.3g} TFLOP/s "
            f"({result['peak']['source']}).\n",
            f"    {result['command']}\n",
            *("| " + " | ".join(row) + " |" for row in table),
            "",
            *(f"- {line}" for line in lines(result)),
            "",
        ]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Tokens per second of every round, and where our step's time goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, phases = figure.subplots(1, 2)
    tokens = result["step"]["tokens"]
    for place, (name, numbers) in enumerate(result["sides"].items()):
        speed.bar(place, numbers["tokens_per_second"], width=0.6, color=f"C{place}", alpha=0.5, label=name)
        rounds = [tokens / seconds for seconds in numbers["seconds_per_step"]["all"]]
        speed.plot([place] * len(rounds), rounds, "_", markersize=14, color=f"C{place}")
    speed.set_xticks(range(len(result["sides"])), list(result["sides"]))
    speed.set_ylabel("tokens per second")
    ratio = f", ratio {result['ratio']:.2f}" if "ratio" in result else ""
    speed.set_title(f"{Path(result['recipe']).stem}, {result['world_size']} rank(s){ratio}")
    seconds = result["sides"][PRODUCT]["phase_seconds"]
    bars = phases.barh(list(seconds), list(seconds.values()))
    phases.bar_label(bars, fmt="%.3f", padding=3)
    phases.invert_yaxis()
    phases.margins(x=0.2)
    phases.set_xlabel("seconds")
    phases.set_title("our step by phase; data is outside it")
    figure.savefig(path, dpi=120)
