"""examples/gpu_suite.sh on a machine without a GPU: its plan, its refusals, and that a failing stage stops no other."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT, environment

SUITE = ROOT / "examples" / "gpu_suite.sh"
PLAYED = """#!/bin/sh
case "$1" in
  -c) exit 0 ;;
  -) cat >/dev/null; echo "a machine" ;;
  -m) echo "tests ran"; exit "$TESTS_CODE" ;;
  tools/bench.py) echo "benchmark ran: $*" ;;
  *) sleep 30 ;;
esac
"""


def suite(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SUITE), *options], env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )


def test_the_plan() -> None:
    done = suite("--dry-run", PYTHON="python3")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "tests",
        "quickstart",
        "throughput",
        "attention",
        "kernels",
    ]
    named = re.findall(r"(?:examples|tools)/[\w/]+\.\w+", done.stdout)
    assert len(named) == 5 and all((ROOT / path).is_file() for path in named)


def test_what_is_refused() -> None:
    assert suite("--fast").stderr == "error: found --fast; options are --collect DIR, --wheels DIR, --dry-run\n"
    done = suite(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (1, "error: no CUDA device that torch can use\n")


def test_a_failing_stage_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    """Tests that fail, a quickstart that outruns its time, a benchmark that goes well."""
    python = tmp_path / "python"
    python.write_text(PLAYED)
    python.chmod(0o755)
    out = tmp_path / "out"
    done = suite(PYTHON=str(python), OUT=str(out), STAGE_SECONDS="1", TESTS_CODE="1")
    assert done.returncode == 2, done
    rows = re.findall(r"^\| (\w+) \| (\d+) \|", (out / "gpu_suite.md").read_text(), re.MULTILINE)
    assert rows == [("tests", "1"), ("quickstart", "124"), ("throughput", "0"), ("attention", "0"), ("kernels", "0")]
    log = (out / "gpu_suite.log").read_text()
    assert "tests ran" in log and "benchmark ran: tools/bench.py throughput" in log
    assert os.listdir(out).count("quickstart_gpu.json") == 0  # nothing of an older run is passed off


def test_what_is_collected_is_pinned() -> None:
    needed = re.findall(r'^needed="(.*?)"', SUITE.read_text(), re.MULTILINE | re.DOTALL)[0].split()
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints-cpu.txt").read_text().splitlines()}
    assert len(needed) > 5 and set(needed) <= pinned
