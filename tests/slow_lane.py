"""The slow lane's parts: each test marked `slow` belongs to exactly one, by its file.

    python -m tests.slow_lane              lists them
    python -m tests.slow_lane --write      the same, into CONTRIBUTING.md
    python -m tests.slow_lane master       runs one; `all` runs each in turn
    python -m tests.slow_lane master -x    the rest is pytest's

Minutes are of 2 cores that do nothing else, at the commit that CONTRIBUTING names. A part that grows beyond 60 is
split.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_MINUTES = 60
BEGIN, END = "<!-- slow lane: made by python -m tests.slow_lane --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Part:
    """Test files, as patterns below tests/, and how long their slow tests take; None where nobody has measured it."""

    about: str
    files: tuple[str, ...]
    minutes: int | None = None


PARTS = {
    "units": Part(
        "units, kernels under Triton's interpreter, ten thousand spoiled inputs",
        ("unit/*", "kernels/*", "fuzz/*", "data/*", "architecture/*"),
    ),
    "master": Part("the master test in the layouts that the fast lane leaves out", ("distributed/test_master.py",)),
    "batches": Part("seams, unusual batches, packing, media, the layout check, and the rest", ("distributed/*",)),
    "attention": Part(
        "attention over ranks, losses, FP8, what an estimate says against what is used",
        (
            "distributed/test_context_attention.py",
            "distributed/test_ring.py",
            "distributed/test_ulysses.py",
            "distributed/test_loss.py",
            "distributed/test_training_loss.py",
            "distributed/test_step.py",
            "distributed/test_language.py",
            "distributed/test_fp8*",
            "distributed/test_transformer_engine.py",
            "distributed/test_megatron_on_cpu.py",
            "distributed/test_memory.py",
            "distributed/test_estimate.py",
            "distributed/test_runtime.py",
        ),
    ),
    "runs": Part(
        "checkpoints, the loop, evaluation, answers",
        (
            "distributed/test_checkpoint*",
            "distributed/test_vision_checkpoint.py",
            "distributed/test_hub_commits.py",
            "distributed/test_loop.py",
            "distributed/test_reports.py",
            "distributed/test_held_out.py",
            "distributed/test_evaluation.py",
            "distributed/test_generation*",
        ),
    ),
    "conversion": Part("weights in and out", ("conversion/*",)),
    "tools": Part("commands as a user starts them", ("system/*",)),
    "faults": Part(
        "bad input, faults at the start, lost ranks, signals, two nodes",
        (
            "system/test_bad_input.py",
            "system/test_failures.py",
            "system/test_faults_together.py",
            "system/test_launch.py",
            "system/test_stop_signals.py",
            "system/test_two_nodes.py",
        ),
    ),
    "kills": Part(
        "faults while running, kills at any moment", ("system/test_running_faults.py", "system/test_kills.py")
    ),
    "benchmarks": Part(
        "the benchmarks and the GPU suite, rehearsed",
        ("system/test_bench*", "system/test_gpu_suite.py", "system/test_async_save_cost.py"),
    ),
}


def parts_of(file: str) -> list[str]:
    """Names of the parts that have a file, which is named from tests/ on: one, or the table is wrong.

    Of several patterns that match, the longest counts: a folder's own holds for what no other names.
    """
    matching = [(pattern, name) for name, part in PARTS.items() for pattern in part.files if fnmatch(file, pattern)]
    longest = max((len(pattern) for pattern, _ in matching), default=0)
    return sorted(name for pattern, name in matching if len(pattern) == longest)


def files_of(name: str) -> Iterator[str]:
    """A part's test files, from the repository's root on."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if name in parts_of(path.relative_to(ROOT / "tests").as_posix()):
            yield path.relative_to(ROOT).as_posix()


def table() -> str:
    """The parts in Markdown."""
    rows = [f"| `{name}` | {part.about} | {part.minutes or 'not measured'} |" for name, part in sorted(PARTS.items())]
    return "\n".join(["| `PART` | its tests | minutes |", "|---|---|---|", *rows])


def rewritten(document: str) -> str:
    """CONTRIBUTING with the table made anew."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"CONTRIBUTING.md needs the lines {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def run(name: str, options: list[str]) -> int:
    """Runs a part's slow tests in a process of their own; pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-m", "slow and not gpu", *files_of(name), *options]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main(words: list[str]) -> int:
    if not words:
        print(table())
        return 0
    name, *options = words
    if name == "--write":
        path = ROOT / "CONTRIBUTING.md"
        path.write_text(rewritten(path.read_text()))
        return 0
    if name not in (*PARTS, "all"):
        print(f"error: PART: found {name!r}, needs one of {', '.join(sorted(PARTS))} or all", file=sys.stderr)
        return 2
    return max((run(part, options) for part in (PARTS if name == "all" else [name])), key=abs)  # killed: below 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
