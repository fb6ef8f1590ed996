"""Cost of commands until they help, refuse, answer or train, in ratios of processor time to importing their base.

The base is `python -c 'import torch, transformers'`; of `generate` it is a script that uses transformers alone and asks
an equal model for the same word. Time is the processors', user and system, children included, so that it says little of
what else the machine does; the commands take turns, and medians of the rounds are compared. Of the quickstart's
training it is what all processes have taken when the first step is reported, divided by the ranks.

A table says what each command imports, from a run of its own under `-X importtime`, which also warms the caches. What
exceeds its limit is said, and no error: limits hold on an idle machine.
"""

import argparse
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

from .commands import (
    FIRST_STEP,
    NUM_RANKS,
    RECIPE,
    STEP_LIMIT,
    TORCH,
    Checkout,
    Command,
    commands,
    overrides,
    prepare,
)
from .import_times import rows as import_rows
from .import_times import summary

ROOT = Path(__file__).parents[3]
POLL_SECONDS, LIMIT_SECONDS = 0.02, 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    parser.add_argument("--rounds", type=whole_number(1), default=5, metavar="N", help="of each command (default 5)")
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, metavar="FOLDER", help="whose commands are run (default: this one)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="commands whose name has it, and what they need")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures and tells. Raises ConfigError on several ranks."""
    from .. import report

    if launch.world_size > 1:
        raise ConfigError(f"start-up is measured from one process, found {launch.world_size} ranks")
    checkout = Checkout(arguments.checkout.resolve())
    with tempfile.TemporaryDirectory(prefix="bench_startup") as scratch:
        folder = Path(scratch)
        prepare(checkout, folder)
        measured = measure(checkout, folder, arguments.rounds, arguments.only)
    result = report.header("startup", "CPU") | {"rounds": arguments.rounds} | measured
    result["measured_commit"] = report.commit(checkout.root)
    report.keep(result, markdown(result), arguments)
    for row in rows(result):
        print(" | ".join(row))
    for row in import_rows(result["imports"]):
        print(" | ".join(row))


def measure(checkout: Checkout, folder: Path, rounds: int, only: str = "") -> dict[str, Any]:
    """Processor seconds, ratios and imports by command."""
    from ..report import spread

    known = chosen(commands(checkout, folder), only)
    steps = only in FIRST_STEP
    imports = {name: summary(log_of(checkout, command)) for name, command in known.items()}
    seconds: dict[str, list[float]] = {name: [] for name in [*known, *([FIRST_STEP] if steps else [])]}
    for _ in range(rounds):
        for name, command in known.items():
            seconds[name].append(processor_seconds(checkout, command))
        if steps:
            seconds[FIRST_STEP].append(first_step_seconds(checkout, folder))
    found = {name: spread(values) for name, values in seconds.items()}
    limits = {name: (command.base, command.limit) for name, command in known.items() if command.limit < float("inf")}
    limits |= {FIRST_STEP: (TORCH, STEP_LIMIT)} if steps else {}
    return {
        "cpu_seconds": found,
        "ratio": {name: found[name]["median"] / found[base]["median"] for name, (base, _) in limits.items()},
        "limits": {name: limit for name, (_, limit) in limits.items()},
        "imports": imports,
    }


def chosen(known: dict[str, Command], only: str) -> dict[str, Command]:
    """Commands whose name has the text, and their bases; of an empty text all."""
    names = {name for name, command in known.items() if only in name}
    needed = {TORCH, *names, *(known[name].base for name in names)}
    return {name: command for name, command in known.items() if name in needed}


def log_of(checkout: Checkout, command: Command) -> str:
    """Reads the log of `-X importtime` of a run."""
    line = checkout.line("-X", "importtime", *command.words)
    done = subprocess.run(line, cwd=checkout.root, capture_output=True, text=True, check=False)
    assert done.returncode == command.code, f"{command.words}: {done.stderr[-2000:]}"
    return done.stderr


def processor_seconds(checkout: Checkout, command: Command) -> float:
    """User's and system's of a run, with those of the processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = checkout.line(*command.words)
    done = subprocess.run(line, cwd=checkout.root, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == command.code, f"{command.words}: {done.stderr[-2000:]}"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step_seconds(checkout: Checkout, folder: Path) -> float:
    """Measures the quickstart's job, launcher and workers included, up to the report of its first step, by rank."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    report = folder / "run" / "metrics.jsonl"
    train = ["tools/train.py", RECIPE, *overrides(folder)]
    line = checkout.line("tools/launch.py", "--local", "--ranks", str(NUM_RANKS), "--", *train)
    deadline = time.monotonic() + LIMIT_SECONDS
    with (folder / "train.log").open("w") as log:
        job = subprocess.Popen(line, cwd=checkout.root, stdout=log, stderr=log)
        try:
            while not (report.is_file() and "\n" in report.read_text()):
                told = (folder / "train.log").read_text()
                assert job.poll() is None and time.monotonic() < deadline, f"no first step: {told[-2000:]}"
                time.sleep(POLL_SECONDS)
            return tree_seconds(job.pid) / NUM_RANKS
        finally:
            job.send_signal(signal.SIGTERM)  # the ranks save and end
            job.wait(LIMIT_SECONDS)


def tree_seconds(pid: int) -> float:
    """Processor time so far of a process, of those below it, and of those that they have waited for."""
    import psutil

    root, total = psutil.Process(pid), 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and both of its children that are gone
        except psutil.NoSuchProcess:
            continue
    return total


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A heading and a line per command."""
    table = [["command", "processor time, s (min..max)", "ratio", "at most", ""]]
    for name, seconds in result["cpu_seconds"].items():
        time_taken = f"{seconds['median']:.2f} ({seconds['min']:.2f}..{seconds['max']:.2f})"
        if name not in result["ratio"]:
            table.append([name, time_taken, "", "", "base"])
            continue
        ratio, limit = result["ratio"][name], result["limits"][name]
        table.append([name, time_taken, f"{ratio:.2f}", f"{limit:g}", "" if ratio <= limit else "missed"])
    return table


def markdown(result: dict[str, Any]) -> str:
    """A section for docs/benchmarks."""
    from .. import report

    tables = []
    for heading, *lines in (rows(result), [*import_rows(result["imports"])]):
        tables += ["", *("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *lines))]
    return "\n".join(
        [
            f"\n### Commands of {result['measured_commit']}\n",
            f"{report.origin(result)}; medians of {result['rounds']} rounds.\n",
            f"    {result['command']}",
            *tables,
            "",
        ]
    )
