"""What the launcher decides: times, where to run, the lines for SLURM, whether to try again, who hears a signal."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.launching import slurm
from megatron_vlm.runtime.launching.command import listeners
from megatron_vlm.runtime.launching.launcher import Plan, Request, make_plan
from megatron_vlm.runtime.launching.restarts import TIME_IS_UP, Attempt, Rules, decide, describe_code

LAUNCHER = Path("/repo/tools/launch.py")
ON_A_CLUSTER = {"VILA_SLURM_ACCOUNT": "acc", "VILA_SLURM_PARTITION": "part"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4:00:00", 14_400),
        ("26:00:00", 93_600),
        ("30", 1_800),
        ("1:30", 90),
        ("2-00", 172_800),
        ("1-12:30", 131_400),
        ("7-00:00:01", 604_801),
        ("0:00:05", 5),
    ],
)
def test_times_of_slurm(text: str, seconds: int) -> None:
    assert slurm.parse_time(text) == seconds
    assert slurm.parse_time(slurm.format_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00:00", "4h", "-5", "1:2:3:4", "1-", "1.5", "four"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--time: found .*, needed HH:MM:SS"):
        slurm.parse_time(text)


def test_a_time_as_slurm_writes_it() -> None:
    assert slurm.format_time(93_605) == "1-02:00:05"


@pytest.fixture
def on_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun and sbatch are found."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": str(tmp_path)}


def plan(environment: dict[str, str], **options: Any) -> Plan:
    given = {"command": ("torchrun", "train.py", "a b"), "launcher": (sys.executable, str(LAUNCHER)), **options}
    return make_plan(Request(**given), slurm.Surroundings(environment))


@pytest.mark.parametrize(
    ("extra", "options", "why"),
    [
        ({"NO_SLURM": "1"}, {}, "NO_SLURM is set"),
        ({"SLURM_JOB_ID": "5"}, {}, "inside SLURM job 5"),
        ({"PATH": "/nowhere"}, {}, "no srun on PATH"),
        ({"PATH": "/nowhere"}, {"batch": True}, "no sbatch on PATH"),
        ({}, {"local": True}, "--local"),
        ({}, {"job_name": "x"}, None),
    ],
)
def test_where_it_runs(on_path: dict[str, str], extra: dict, options: dict, why: str | None) -> None:
    found = plan({**on_path, **ON_A_CLUSTER, **extra}, **options)
    assert found.why_local == why
    assert (found.line[0] == "srun") == (why is None)


def test_a_local_run_has_its_own_rules() -> None:
    def rules(environment: dict[str, str], **options: Any) -> Rules:
        return plan(environment, local=True, **options).rules

    assert rules({}) == Rules(3, "count", None, 120)
    assert rules({}, mode="eval", time="10") == Rules(0, "count", 600, 120)
    assert rules({"SLURM_JOB_ID": "5"}, max_restarts=7) == Rules(7, "leave", None, 120)


def test_the_line_for_srun(on_path: dict[str, str]) -> None:
    found = plan(
        {**on_path, **ON_A_CLUSTER}, job_name="x", nodes=2, time="26:00:00", slurm_options=("--qos=high",),
        save_seconds=300,
    )  # fmt: skip
    assert found.variables == {"RUN_NAME": "x", "OUTPUT_DIR": "runs/train/x"}
    assert found.rules == Rules(3, "free")
    line = found.shell_line()
    assert line == (
        "RUN_NAME=x OUTPUT_DIR=runs/train/x srun --account acc --partition part --job-name acc:train/x --nodes 2 "
        "--ntasks-per-node 1 --gpus-per-node 8 --time 1-02:00:00 --exclusive --signal=USR1@300 --qos=high "
        "--output runs/train/x/slurm/%J-%t.out --error runs/train/x/slurm/%J-%t.err --open-mode append --wait 60 "
        f"{sys.executable} {LAUNCHER} --local --max-restarts 0 -- torchrun train.py 'a b'"
    )


def test_the_line_for_sbatch(on_path: dict[str, str]) -> None:
    environment = {**on_path, **ON_A_CLUSTER}
    found = plan(environment, batch=True, job_name="x", gpus_per_node=0, account="mine", output_dir="/d")
    assert found.line[:3] == ["sbatch", "--account", "mine"]  # options win over the environment
    assert "mine:train/x" in found.line and "--requeue" in found.line and "--gpus-per-node" not in found.line
    assert "/d/slurm/%j.out" in found.line
    assert found.line[-2] == "--wrap"
    wrapped = found.line[-1]
    assert wrapped.startswith(f"exec {sys.executable} {LAUNCHER} --local --requeue --max-restarts 3 -- srun ")
    assert wrapped.endswith("--local --max-restarts 0 -- torchrun train.py 'a b'")


def test_the_names(on_path: dict[str, str]) -> None:
    assert plan({}, local=True).variables == {}
    name = plan({}, local=True, job_name="a-%t", mode="eval").variables["RUN_NAME"]
    assert name.startswith("a-20") and len(name) == len("a-") + 14


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (
            {},
            {"job_name": "x"},
            "SLURM: found no --account or VILA_SLURM_ACCOUNT and no --partition or VILA_SLURM_PARTITION;"
            " --local runs without SLURM",
        ),
        (
            {"VILA_SLURM_ACCOUNT": "a"},
            {"job_name": "x"},
            "SLURM: found no --partition or VILA_SLURM_PARTITION; --local runs without SLURM",
        ),
        (ON_A_CLUSTER, {}, "--job-name: found none, needed one for SLURM; --local runs without SLURM"),
        ({}, {"command": ()}, "command: found nothing to run, needed: launch.py [options] -- COMMAND ..."),
        ({}, {"local": True, "requeue": True}, "--requeue: found no SLURM_JOB_ID, needed a SLURM batch job"),
        (
            {},
            {"local": True, "time": "2", "save_seconds": 120},
            "--save-seconds: found 120, needed less than --time (120) and at most 65535",
        ),
    ],
)
def test_what_is_missing_is_said_at_once(on_path: dict, environment: dict, options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan({**on_path, **environment}, **options)
    assert str(caught.value) == message


QUICK, LATER, TIME = Attempt(1, 5), Attempt(1, 100), Attempt(TIME_IS_UP, 100)
KILLED = Attempt(137, 2)


@pytest.mark.parametrize(
    ("attempts", "at_time_limit", "again", "why"),
    [
        ([Attempt(0, 5)], "count", False, "ended well"),
        ([LATER], "count", True, "failed: exit code 1; starting again, restart 1 of 2"),
        ([LATER] * 2, "count", True, "failed: exit code 1; starting again, restart 2 of 2"),
        ([LATER] * 3, "count", False, "failed: exit code 1; no restart left of 2"),
        ([QUICK], "count", True, "failed: exit code 1; starting again, restart 1 of 2"),
        ([QUICK] * 2, "count", False, "failed: exit code 1, at once and as before: an error to mend, not to try again"),
        ([QUICK, Attempt(2, 5)], "count", True, "failed: exit code 2; starting again, restart 2 of 2"),
        ([QUICK, LATER], "count", True, "failed: exit code 1; starting again, restart 2 of 2"),
        ([KILLED] * 2, "count", True, "failed: exit code 137, killed by SIGKILL; starting again, restart 2 of 2"),
        ([TIME], "count", True, "stopped at its time limit, unfinished; starting again, restart 1 of 2"),
        ([TIME] * 3, "count", False, "stopped at its time limit, unfinished; no restart left of 2"),
        ([TIME] * 9, "free", True, "stopped at its time limit, unfinished; starting again"),
        ([LATER] * 2 + [TIME, LATER], "free", True, "failed: exit code 1; starting again, restart 1 of 2"),
        ([LATER] * 3, "free", False, "failed: exit code 1; no restart left of 2"),
        ([TIME], "leave", False, "stopped at its time limit, unfinished"),
        ([Attempt(7, 9, asked=True)], "count", False, "ended, as asked from outside: exit code 7"),
        ([Attempt(TIME_IS_UP, 1)] * 2, "free", False, None),  # a command that always ends so at once
    ],
)  # fmt: skip
def test_whether_to_try_again(attempts: list[Attempt], at_time_limit: Any, again: bool, why: str | None) -> None:
    found, words = decide(attempts, Rules(2, at_time_limit))
    assert found == again
    assert why is None or words == why


def test_codes_in_words() -> None:
    assert describe_code(255) == "exit code 255, killed by signal 127"
    assert describe_code(128) == "exit code 128"


LISTENER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, lambda *_: None)
children = [subprocess.Popen([sys.executable, "-c", text], env=dict(os.environ, **extra)) for text, extra in {children}]
os.write(1, b"up\\n")
time.sleep(60)
"""
CATCHES = (
    "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: None); os.write(1, b'up\\n'); time.sleep(60)"
)
BLOCKS = "import os, signal, time; signal.pthread_sigmask(0, [signal.SIGUSR1]); os.write(1, b'up\\n'); time.sleep(60)"
DEAF = "import os, time; os.write(1, b'up\\n'); time.sleep(60)"


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        ([(CATCHES, {}), (DEAF, {})], [0]),  # the topmost passes it on
        ([(CATCHES, {"RANK": "0"}), (CATCHES, {"RANK": "1"}), (DEAF, {})], [1, 2]),  # ranks, past their launcher
        ([(CATCHES, {"RANK": "0"}), (DEAF, {"RANK": "1"})], [1]),  # not yet listening: would die of it
        ([(BLOCKS, {"RANK": "0"})], []),  # blocked is not yet listening
    ],
)
def test_who_hears(children: list, expected: list[int]) -> None:
    program = LISTENER.replace("{children}", repr(children))
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        for _ in range(len(children) + 1):
            assert parent.stdout.readline() == "up\n"
        root = psutil.Process(parent.pid)
        tree = [root, *sorted(root.children(), key=lambda process: process.pid)]
        found = listeners(tree, signal.SIGUSR1)
        assert sorted(tree.index(process) for process in found) == expected
    finally:
        for process in psutil.Process(parent.pid).children():
            process.kill()
        parent.kill()
        parent.wait()


def test_a_process_that_waits_for_it_hears_it() -> None:
    """srun blocks the signals that it passes on and waits for them."""
    process = subprocess.Popen([sys.executable, "-c", BLOCKS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert [found.pid for found in listeners([psutil.Process(process.pid)], signal.SIGUSR1)] == [process.pid]
    finally:
        process.kill()
        process.wait()
