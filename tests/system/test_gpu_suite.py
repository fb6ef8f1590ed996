"""examples/gpu_suite.sh on a machine without a GPU: its plan, its refusals, that a failing stage stops no other, and
the whole of it rehearsed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.helpers.ranks.processes import ROOT, environment

SUITE = ROOT / "examples" / "gpu_suite.sh"
STAGES = ["tests", "kernels", "step", "step_fp8", "attention", "throughput", "quickstart"]
PLAYED = """#!/bin/sh
case "$1" in
  -c) exit 0 ;;
  -) cat >/dev/null; echo "a machine" ;;
  -m) echo "ran: $*"; case "$2" in tests.*) exit "$TESTS_CODE" ;; esac ;;
  tools/bench.py) echo "benchmark ran: $*" ;;
  *) sleep 30 ;;
esac
"""


def suite(*options: str, seconds: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SUITE), *options],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.fixture
def played(tmp_path: Path) -> str:
    """A python that plays the stages: tests that fail with $TESTS_CODE, a quickstart that never ends."""
    python = tmp_path / "python"
    python.write_text(PLAYED)
    python.chmod(0o755)
    return str(python)


def outcomes(out: Path) -> list[tuple[str, str]]:
    """(stage, exit code) of each row of the summary."""
    return re.findall(r"^\| (\w+) \| ([\w ]+) \|", (out / "gpu_suite.md").read_text(), re.MULTILINE)[1:]


@pytest.mark.parametrize("options", [(), ("--rehearse",)])
def test_the_plan(options: tuple[str, ...]) -> None:
    done = suite("--dry-run", *options, PYTHON="python3")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^(\w+): ", done.stdout, re.MULTILINE) == STAGES
    named = re.findall(r"(?:examples|tools)/[\w/]+\.\w+", done.stdout)
    assert len(named) >= 9 and all((ROOT / path).is_file() for path in named)
    assert ("docs/benchmarks" in done.stdout) == (not options)  # never by default


def test_what_is_refused() -> None:
    assert suite("--fast").stderr == (
        "error: found --fast; options are --collect DIR, --wheels DIR, --only STAGES, --rehearse, --dry-run\n"
    )
    done = suite(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (1, "error: no CUDA device that torch can use\n")


def test_a_failing_stage_is_recorded_and_the_next_one_runs(played: str, tmp_path: Path) -> None:
    """Tests that fail, benchmarks that go well, a quickstart that outruns its time."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "step_gpu.json").write_text("an older run's")
    done = suite(PYTHON=played, OUT=str(out), STAGE_SECONDS="1", TESTS_CODE="1")
    assert done.returncode == 2, done
    assert outcomes(out) == [("tests", "1"), *((stage, "0") for stage in STAGES[1:-1]), ("quickstart", "124")]
    log = (out / "gpu_suite.log").read_text()
    assert "ran: -m tests.helpers.file_by_file" in log and "benchmark ran: tools/bench.py throughput" in log
    assert "2 of 7 stages failed" in done.stdout
    assert sorted(os.listdir(out)) == ["gpu_suite.log", "gpu_suite.md"]  # nothing of an older run is passed off
    assert (out / "gpu_suite.md").read_text().endswith(f"ran: -m tools.benchmarks.kernels.targets {out}\n")


def test_some_stages_and_a_time_that_ends(played: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = suite("--only", "kernels step", PYTHON=played, OUT=str(out), TESTS_CODE="1")
    assert done.returncode == 0 and outcomes(out) == [("kernels", "0"), ("step", "0")]
    assert re.search(r"kernels --device cuda --seconds 1[78]\d --json", done.stdout)  # 200, less 20
    older = [out / f"{stage}_gpu.json" for stage in ("kernels", "attention")]
    for path in older:
        path.write_text("{}")
    suite("--only", "kernels", PYTHON=played, OUT=str(out), TESTS_CODE="1")
    assert [path.exists() for path in older] == [False, True]  # a stage that is not run keeps what it has measured
    done = suite(PYTHON=played, OUT=str(out), SUITE_SECONDS="5", TESTS_CODE="0")
    assert done.returncode == 7 and outcomes(out) == [(stage, "not run") for stage in STAGES]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_rehearsal(tmp_path: Path) -> None:
    """Every stage at tiny size, every file, each of which says what it is."""
    done = suite("--rehearse", seconds=2900, PYTHON=sys.executable, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert outcomes(tmp_path) == [(stage, "0") for stage in STAGES]
    files = {f"{name}_gpu.{kind}" for name in ("kernels", "attention", "throughput") for kind in ("json", "md", "png")}
    files |= {f"{name}_gpu.{kind}" for name in ("step", "step_fp8") for kind in ("json", "md")}
    files |= {"quickstart_gpu.json", "quickstart_gpu.png", "gpu_suite.md", "gpu_suite.log"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == files
    for path in (tmp_path / name for name in files):
        if path.suffix == ".png":
            corner = Image.open(path).convert("RGB").crop((0, 0, 200, 24))
            red, green, _ = corner.split()
            assert ImageChops.subtract(red, green).getextrema()[1] > 200, path
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["rehearsal"].startswith("REHEARSAL")
        else:
            assert path.read_text().startswith("**REHEARSAL")
    told = (tmp_path / "gpu_suite.md").read_text()
    assert told.count("not measured: it is a GPU's, this is the CPU") == 2  # both targets of the whole step
    log = (tmp_path / "gpu_suite.log").read_text()
    assert "test_rms_norm.py" in log and "every file passed" in log  # collected, each kernel's tests for CUDA


FAILING = """
import os, time, pytest
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "arithmetic"
def test_last():
    {last}
"""


@pytest.mark.parametrize(("last", "outcome"), [("pass", "exit code 1"), ("os._exit(9)", "exit code 9")])
def test_a_failing_test_is_in_the_log_at_once(last: str, outcome: str, tmp_path: Path) -> None:
    """Even where its process then dies; the other file runs."""
    (tmp_path / "test_a.py").write_text(FAILING.format(last=last))
    (tmp_path / "test_b.py").write_text("def test_b(): pass\n")
    command = [sys.executable, "-m", "tests.helpers.file_by_file", "--seconds", "200", str(tmp_path), "--", "--rootdir"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 1, done
    assert f"test_a.py: {outcome}" in done.stdout and "test_b.py: exit code 0" in done.stdout
    assert "FAILED AT ONCE test_a.py::test_wrong" in done.stdout and "arithmetic" in done.stdout
    assert done.stdout.rstrip().endswith(f"---- files that did not pass:\n{tmp_path / 'test_a.py'}")


def test_what_is_collected_is_pinned() -> None:
    needed = re.findall(r'^needed="(.*?)"', SUITE.read_text(), re.MULTILINE | re.DOTALL)[0].split()
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints-cpu.txt").read_text().splitlines()}
    assert len(needed) > 5 and set(needed) <= pinned
