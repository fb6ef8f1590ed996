"""The fuzzer's command line; see the package.

python -m tests.fuzz [--inputs 5000] [--seed 0] [--jobs 2] [--kind NAME ...] [--keep FOLDER] [--json FILE]
python -m tests.fuzz --kind NAME --seed 0 --index 17 [--keep FOLDER]
"""

import os

os.environ |= {  # before torch and the others are imported
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
}

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

from tests.fuzz.kind import Kind
from tests.fuzz.runner import Limits, Task, remove, run
from tests.fuzz.verdicts import Verdict

COLUMNS = ("tried", "accepted", "refused", "faults")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000, help="over all kinds, by their shares (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: cores)")
    parser.add_argument("--kind", action="append", help="one kind (may be repeated); default: all")
    parser.add_argument("--index", type=int, help="this input of one kind alone")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs with faults (default: they are removed)")
    parser.add_argument("--processor-seconds", type=int, default=60, help="of an input, at most (default 60)")
    parser.add_argument("--json", type=Path, help="the table and the faults, as JSON")
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    from tests.fuzz.kinds import KINDS, warm_up

    kinds = [KINDS[name] for name in options.kind or KINDS]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        started = time.monotonic()
        warm_up()
        bases = {}
        for kind in kinds:
            (folder / f"base-{kind.name}").mkdir()
            bases[kind.name] = kind.prepare(folder / f"base-{kind.name}")
        print(f"prepared in {time.monotonic() - started:.0f} s", flush=True)
        if options.index is not None:
            tasks = [Task(kind, options.seed, options.index) for kind in kinds]
        else:
            tasks = plan(kinds, options.inputs, options.seed)
        raise SystemExit(_run(tasks, bases, folder, options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(kinds: list[Kind], inputs: int, seed: int) -> list[Task]:
    """So many inputs, by the kinds' shares, well mixed."""
    ends = [
        round(inputs * part / sum(kind.share for kind in kinds)) for part in accumulate(kind.share for kind in kinds)
    ]
    numbers = [end - start for start, end in pairwise([0, *ends])]
    tasks = [Task(kind, seed, index) for kind, number in zip(kinds, numbers, strict=True) for index in range(number)]
    Random(seed).shuffle(tasks)
    return tasks


def _run(tasks: list[Task], bases: dict[str, object], folder: Path, options: argparse.Namespace) -> int:
    """Runs them, prints faults as they come and the table at the end; returns the exit code."""
    counts: Counter[tuple[str, str]] = Counter()
    seconds: Counter[str] = Counter()
    faults: list[tuple[Task, Verdict]] = []
    started = told = time.monotonic()
    for done, (task, verdict, place, took) in enumerate(
        run(tasks, bases, folder, options.jobs, Limits(processor_seconds=options.processor_seconds)), start=1
    ):
        counts[task.kind.name, "faults" if verdict.is_fault else verdict.kind] += 1
        seconds[task.kind.name] += took
        if verdict.is_fault:
            faults.append((task, verdict))
            print(f"FAULT {verdict.kind}: {task}\n    {_last_line(verdict.told)}", flush=True)
        if options.index is not None:
            print(f"{task}: {verdict.kind}\n{verdict.told}", flush=True)
        if options.keep is not None and (verdict.is_fault or options.index is not None):
            options.keep.mkdir(parents=True, exist_ok=True)
            (place / "verdict.txt").write_text(f"{task}\n{verdict.kind}\n{verdict.told}\n", errors="backslashreplace")
            kept = options.keep / f"{task.kind.name}-{task.seed}-{task.index}"
            remove(kept)
            shutil.move(place, kept)
            print(f"    kept in {kept}", flush=True)
        remove(place)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            print(f"{done} of {len(tasks)} inputs, {len(faults)} faults, {told - started:.0f} s", flush=True)
    print(table(tasks, counts, seconds))
    print(f"{len(tasks)} inputs, {len(faults)} faults, {time.monotonic() - started:.0f} s, seed {options.seed}")
    if options.json is not None:
        rows = [{"task": str(task), "fault": verdict.kind, "told": verdict.told} for task, verdict in faults]
        numbers = {f"{kind} {what}": count for (kind, what), count in sorted(counts.items())}
        options.json.write_text(json.dumps({"inputs": len(tasks), "numbers": numbers, "faults": rows}, indent=1))
    return 1 if faults else 0


def table(tasks: list[Task], counts: Counter[tuple[str, str]], seconds: Counter[str]) -> str:
    """What came of the inputs, by kind."""
    names = sorted({task.kind.name for task in tasks})
    tried = Counter(task.kind.name for task in tasks)
    lines = ["| kind | " + " | ".join(COLUMNS) + " | CPU s |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name in names:
        numbers = (tried[name], *(counts[name, what] for what in COLUMNS[1:]))
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {seconds[name]:.0f} |")
    sums = (len(tasks), *(sum(counts[name, what] for name in names) for what in COLUMNS[1:]))
    return "\n".join([*lines, f"| all | {' | '.join(map(str, sums))} | {sum(seconds.values()):.0f} |"])


def _last_line(told: str) -> str:
    return (told.strip().splitlines() or [""])[-1][:300]


if __name__ == "__main__":
    main()
