"""The fast lane, in processes side by side: `python -m tests.fast_lane` is `make test`, with `unit` `make test-unit`.

Tests with ranks and commands wait for each other and for limits of time during much of theirs, and units keep one core
busy: side by side, two cores take little more than half of the processor time. Of one share the output comes at once,
of the others when all have ended.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTHING_SELECTED = 5  # pytest's exit code
FAST = (("distributed",), ("conversion", "system"), ("unit", "architecture", "kernels", "fuzz", "data"))
SECOND_HALF = "e"  # of the units, by the first letter of their folder: as long as the half before


def unit_shares() -> tuple[tuple[str, ...], ...]:
    """The units in two halves, the architecture with the second."""
    entries = sorted(path.name for path in (ROOT / "tests" / "unit").glob("[!_]*"))
    halves = [name for name in entries if name < SECOND_HALF], [name for name in entries if name >= SECOND_HALF]
    first, second = ([f"unit/{name}" for name in half] for half in halves)
    return tuple(first), ("architecture", *second)


def command(folders: tuple[str, ...]) -> list[str]:
    """Runs the fast tests of these folders of tests/."""
    return [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", *(f"tests/{folder}" for folder in folders)]


def run(shares: tuple[tuple[str, ...], ...], options: Sequence[str] = ()) -> int:
    """Runs all at once, with options of pytest's; an exit code that is not 0 where one has such. A share in which the
    options select nothing is no failure, unless they select nothing in any."""
    first, *others = shares
    logs = [tempfile.TemporaryFile() for _ in others]
    running = [  # the first alone keeps what failed last
        subprocess.Popen([*command(share), *options, "-p", "no:cacheprovider"], cwd=ROOT, stdout=log, stderr=log)
        for share, log in zip(others, logs, strict=True)
    ]
    try:
        codes = [subprocess.run([*command(first), *options], cwd=ROOT, check=False).returncode]
        codes += [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
    for log in logs:
        log.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(log.read())
        log.close()
    return max((code for code in codes if code != NOTHING_SELECTED), key=abs, default=NOTHING_SELECTED)


if __name__ == "__main__":
    is_unit = sys.argv[1:2] == ["unit"]
    sys.exit(run(unit_shares() if is_unit else FAST, sys.argv[1 + is_unit :]))
