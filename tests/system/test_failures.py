"""The error contract of DESIGN 5 on real jobs: one rank fails, all end within 30 s, and stderr says why, once."""

import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_vlm.runtime.failure import STORE_SECONDS
from tests.helpers.ranks.plain_ranks import plain_ranks
from tests.helpers.ranks.processes import ROOT, environment

JOB = ROOT / "tests" / "helpers" / "faults" / "failing_job.py"
LIMIT_SECONDS = 30
START_SECONDS = 90  # imports of two ranks on a busy machine
USER_LINE = "error: training.steps: found 0, needed a positive number\n"


@dataclass
class Outcome:
    """How a job ended; `own_stderr` without what torchrun itself reports."""

    code: int
    stdout: str
    own_stderr: str
    stderr: str
    ended: float  # time.time()

    def check_ended_in_time(self, failing: "Outcome") -> None:
        """At most 30 s between the failure and this end."""
        failed = float(re.findall(r"fails at ([0-9.]+)", failing.stdout)[0])
        assert 0 < self.ended - failed < LIMIT_SECONDS


def torchrun(tmp_path: Path, *arguments: str, num_ranks: int = 2) -> Outcome:
    """Runs the job under torchrun, each rank's output in its own file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--log-dir", str(tmp_path), "--redirects=3", str(JOB), *arguments]
    limit = START_SECONDS + LIMIT_SECONDS
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=limit, check=False)
    ended = time.time()

    def logs(name: str) -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.rglob(name)))

    outcome = Outcome(done.returncode, logs("stdout.log"), logs("stderr.log"), done.stderr, ended)
    if arguments[0] != "none":
        outcome.check_ended_in_time(outcome)
    return outcome


def outcomes_of(*arguments: str) -> list[Outcome]:
    """Runs the job on two ranks of a plain launcher."""
    outcomes = []
    with plain_ranks([JOB, *arguments]) as processes:
        for process in processes:
            out, err = process.communicate(timeout=START_SECONDS + LIMIT_SECONDS)
            outcomes.append(Outcome(process.returncode, out, err, err, time.time()))
    return outcomes


@pytest.mark.slow
def test_a_job_that_goes_well(tmp_path: Path) -> None:
    outcome = torchrun(tmp_path, "none", "collective")
    assert (outcome.code, outcome.own_stderr) == (0, "")
    assert outcome.stdout == "rank 0: 4\nrank 1: 4\n"


@pytest.mark.parametrize("when", ["config", pytest.param("collective", marks=pytest.mark.slow)])
def test_an_error_on_all_ranks_is_told_once_by_the_lowest(tmp_path: Path, when: str) -> None:
    outcome = torchrun(tmp_path, "user-all", when)
    assert outcome.code != 0
    assert outcome.own_stderr == "error: training.steps: found 0 on rank 0, needed a positive number\n"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["config", "collective"])
def test_a_users_error_on_one_rank_ends_the_others(tmp_path: Path, when: str) -> None:
    outcome = torchrun(tmp_path, "user", when)
    assert (outcome.code != 0, outcome.own_stderr) == (True, USER_LINE)


@pytest.mark.slow
def test_debug_tells_where_the_users_error_came_from(tmp_path: Path) -> None:
    outcome = torchrun(tmp_path, "user", "collective", "--debug")
    assert "rank 1 failed:\nTraceback" in outcome.own_stderr and "in fail\n" in outcome.own_stderr


def test_an_internal_error_shows_its_traceback_and_no_other(tmp_path: Path) -> None:
    outcome = torchrun(tmp_path, "internal", "collective")
    assert outcome.code != 0
    assert outcome.own_stderr.startswith("rank 1 failed:\nTraceback")
    assert outcome.own_stderr.endswith("KeyError: 'a broken invariant'\n")
    assert outcome.own_stderr.count("Traceback") == 1


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    outcome = torchrun(tmp_path, "killed", "collective")
    assert outcome.code != 0 and "Traceback" not in outcome.own_stderr
    assert "SIGKILL" in outcome.stderr  # torchrun's own report names the rank


@pytest.mark.parametrize("when", [*(pytest.param(w, marks=pytest.mark.slow) for w in ("world", "collective")), "sleep"])
def test_without_an_agent_the_watchers_end_the_others(when: str) -> None:
    waiting, failing = outcomes_of("user", when)
    assert (failing.code, failing.own_stderr) == (1, USER_LINE)
    assert (waiting.code, waiting.own_stderr, waiting.stdout) == (1, "", "")
    waiting.check_ended_in_time(failing)


@pytest.mark.slow
def test_without_an_agent_a_killed_rank_is_noticed_in_the_collective() -> None:
    waiting, killed = outcomes_of("killed", "collective")
    assert killed.code == -9
    assert waiting.code == 1
    waiting.check_ended_in_time(killed)
    assert re.fullmatch(
        r"error: rank 0 lost another rank, which ended without a word \(killed\?\): .*\n", waiting.own_stderr
    )


@pytest.mark.slow
def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(JOB), *arguments]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)

    well, wrong = run("none", "collective"), run("user-all", "collective")
    assert (well.returncode, well.stdout, well.stderr) == (0, "rank 0: 1\n", "")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: training.steps: found 0 on rank 0, needed a positive number\n"


@pytest.mark.slow
def test_ranks_of_one_machine_are_watched_whatever_it_is_called() -> None:
    """A plain launcher says the machine's own address, or 127.0.1.1 as Debian's /etc/hosts does."""
    with plain_ranks([JOB, "user", "sleep"], address="127.0.1.1") as started:
        told = [process.communicate(timeout=START_SECONDS)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1] and "".join(told) == USER_LINE


@pytest.mark.slow
def test_a_host_of_the_store_that_comes_late_is_waited_for() -> None:
    """By what watches the ranks too: only the main thread knows `runtime.timeout_seconds`."""
    with plain_ranks([JOB, "none", "collective"], late_seconds=3 * STORE_SECONDS) as started:
        told = [process.communicate(timeout=START_SECONDS)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0] and told == ["", ""]


@pytest.mark.slow
def test_without_an_agent_a_port_that_is_taken_costs_one_line() -> None:
    """There is no store to agree on a speaker then."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        shared = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, str(JOB), "none", "collective"],
            env=environment(**shared, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            capture_output=True, text=True, timeout=START_SECONDS + LIMIT_SECONDS, check=False,
        )  # fmt: skip
    line = f"error: MASTER_PORT: found {port}, where another process listens already, needs a free port\n"
    assert (done.returncode, done.stderr) == (1, line)
