"""The record of what tests have shown on CPUs: docs/benchmarks/cpu_tests.json, from which tables are made.

`pytest --record FILE` adds what a run has shown, test file by test file: how many passed, failed and were skipped, on
which machine, at which commit (with `+` where files differ from it), when. A file that runs again takes its own place;
one that is gone is taken out. Runs beside each other take turns.
"""

import fcntl
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORD = "docs/benchmarks/cpu_tests.json"
OUTCOMES = ("passed", "failed", "skipped")
Results = dict[str, dict[str, Any]]  # by test file, from the repository's root on


class Recorder:
    """A plugin of pytest's: counts outcomes by test file, and records them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # of setting up and ending, what went wrong
            counts = self.counts.setdefault(report.nodeid.partition("::")[0], Counter())
            counts[report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":  # a file that cannot be imported
            self.counts.setdefault(report.nodeid, Counter())["failed"] += 1

    def pytest_sessionfinish(self) -> None:
        add(self.path, self.counts, circumstances(), ROOT)


def circumstances() -> dict[str, Any]:
    """Of this run: commit, day, machine, versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
    from importlib.metadata import version

    return {
        "commit": commit.stdout.strip() + ("+" if changed.strip() else ""),  # files differ from it
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def add(path: Path, counts: Mapping[str, Mapping[str, int]], told: Mapping[str, Any], root: Path) -> None:
    """Puts a run's outcomes into the record."""
    path.touch()
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known: Results = json.loads(file.read() or "{}")
        for name, of_file in counts.items():
            known[name] = {outcome: of_file.get(outcome, 0) for outcome in OUTCOMES} | dict(told)
        lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known) if (root / name).exists()]
        file.seek(0)
        file.truncate()
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def outcome(results: Results, path: str) -> str | None:
    """ "yes" where a file, or every recorded one of a folder, has passed; "fails"; None where there is no record."""
    found = [one for name, one in results.items() if name == path or name.startswith(f"{path}/")]
    if any(one["failed"] for one in found):
        return "fails"
    return "yes" if any(one["passed"] for one in found) else None
