"""tools/launch.py on real processes: restarts, signals past torchrun, time limits, and SLURM played by scripts."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_vlm.config import to_yaml
from megatron_vlm.training.hooks.jsonl import read_lines
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks import fake_slurm
from tests.helpers.ranks.processes import ROOT, environment, programs
from tests.helpers.ranks.ranks_below import ranks_below

COMMAND = ROOT / "tests" / "helpers" / "ranks" / "restartable.py"
LAUNCH = [sys.executable, str(ROOT / "tools" / "launch.py")]
EXAMPLES = ROOT / "examples"
LIMIT_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How a launcher ended."""

    code: int
    stdout: str
    stderr: str


class Launcher:
    """A launcher over the command of `restartable.py`, whose log is read here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *options: str, ways: str, ranks: int = 0, **variables: str) -> subprocess.Popen[str]:
        """`ways` for the runs, in order; with `ranks` under torchrun."""
        program = torchrun(ranks) if ranks else [sys.executable]
        return self.start_line(
            [*LAUNCH, *options, "--", *program, str(COMMAND), str(self.log), *ways.split()], **variables
        )

    def start_line(self, line: list[str], **variables: str) -> subprocess.Popen[str]:
        """Any other, a launcher in the end."""
        process = subprocess.Popen(
            line, env=environment(**variables), cwd=self.folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *options: str, ways: str, ranks: int = 0, **variables: str) -> Ended:
        """To its end."""
        return end_of(self.start(*options, ways=ways, ranks=ranks, **variables))

    def lines(self, rank: int | None = None) -> list[str]:
        """What the command has logged."""
        path = self.log.with_name("log" + ("" if rank is None else str(rank)))
        return path.read_text().splitlines() if path.exists() else []

    def ways(self, rank: int | None = None) -> list[str]:
        """The first words: what every run did, and the signals heard."""
        return [line.split()[1] for line in self.lines(rank)]


def torchrun(ranks: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def end_of(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    return Ended(process.returncode, out, err)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def test_a_command_killed_twice_is_brought_to_its_end(launcher: Launcher) -> None:
    ended = launcher.run("-J", "mine", "-m", "eval", "--max-restarts", "2", ways="kill kill 0")
    assert (ended.code, ended.stderr) == (0, "")
    assert launcher.ways() == ["kill", "kill", "0"]
    assert all(line.endswith("mine runs/eval/mine") for line in launcher.lines())  # RUN_NAME, OUTPUT_DIR
    told = re.findall(r"launch: (.*?) *\n", ended.stdout)
    assert told[0].startswith("running here, without SLURM (no srun on PATH): RUN_NAME=mine OUTPUT_DIR=runs/eval/mine")
    assert told[1:] == [
        "attempt 1 failed: exit code 137, killed by SIGKILL; starting again, restart 1 of 2",
        "attempt 2 failed: exit code 137, killed by SIGKILL; starting again, restart 2 of 2",
        "attempt 3 ended well",
    ]


def test_a_command_that_ends_before_its_limit_unasked_is_done(launcher: Launcher) -> None:
    """It ends while ranks would be asked to save, but it has none that listen."""
    ended = launcher.run("-t", "1:00", "--save-seconds", "59", "--max-restarts", "2", ways="late")
    assert ended.code == 0 and launcher.ways() == ["late"]


def test_when_the_restarts_are_used_up_the_code_is_the_commands(launcher: Launcher) -> None:
    assert launcher.run("--max-restarts", "1", ways="kill 5").code == 5
    assert launcher.ways() == ["kill", "5"]


def test_an_error_to_mend_is_not_tried_for_ever(launcher: Launcher) -> None:
    ended = launcher.run("--max-restarts", "50", ways="1")
    assert ended.code == 1
    assert launcher.ways() == ["1", "1"]
    assert "an error to mend, not to try again" in ended.stdout


@pytest.mark.parametrize(
    ("sent", "ways", "code"), [("SIGTERM", "term", 7), ("SIGTERM", "sleep", 143), ("SIGINT", "sleep", 130)]
)
def test_a_signal_from_outside_is_passed_on_and_ends_it(launcher: Launcher, sent: str, ways: str, code: int) -> None:
    process = launcher.start("--max-restarts", "5", ways=ways)
    wait_until(launcher.lines)
    process.send_signal(signal.Signals[sent])
    assert end_of(process).code == code
    assert len([way for way in launcher.ways() if way == ways]) == 1  # no restart


def test_at_the_time_limit_it_saves_and_goes_on(launcher: Launcher) -> None:
    ended = launcher.run("-t", "0:00:08", "--save-seconds", "2", "--max-restarts", "1", ways="save 0")
    assert ended.code == 0, ended
    assert launcher.ways() == ["save", "SIGUSR1", "0"]
    assert "asked 1 processes to save and stop" in ended.stdout


def test_what_does_not_listen_is_ended_at_the_time_limit(launcher: Launcher) -> None:
    ended = launcher.run("-t", "0:00:02", "--save-seconds", "1", "--max-restarts", "0", ways="sleep")
    assert ended.code == 124
    assert "still running at its time limit, ending it" in ended.stdout


def test_timeouts_own_code_is_a_time_limit(launcher: Launcher) -> None:
    ended = launcher.run("--max-restarts", "1", ways="124 0")
    assert ended.code == 0
    assert "attempt 1 stopped at its time limit, unfinished; starting again, restart 1 of 1" in ended.stdout


def test_the_ranks_are_told_past_torchrun(launcher: Launcher) -> None:
    """torchrun dies of SIGUSR1, and its ranks with it: under the launcher it survives one that was meant for all."""
    process = launcher.start("--max-restarts", "1", ways="save 0", ranks=2)
    wait_until(lambda: launcher.lines(0) and launcher.lines(1))
    (torchrun,) = psutil.Process(process.pid).children()
    torchrun.send_signal(signal.SIGUSR1)
    time.sleep(1)
    assert torchrun.is_running() and torchrun.status() != psutil.STATUS_ZOMBIE
    process.send_signal(signal.SIGUSR1)
    ended = end_of(process)
    assert ended.code == 0, ended
    assert launcher.ways(0) == launcher.ways(1) == ["save", "SIGUSR1", "0"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_survives_a_kill_and_a_time_limit(launcher: Launcher) -> None:
    """examples/torchrun/one_node.sh: a rank is killed; later SIGUSR1, as at a time limit; every step is made once."""
    steps = 80
    recipe = launcher.folder / "recipe.yaml"
    recipe.write_text(to_yaml(tiny_recipe(launcher.folder, training={"steps": steps}, checkpoint={"every_steps": 2})))

    def made() -> list[int]:
        return [line["step"] for line in read_lines(launcher.folder / "checkpoints" / "metrics.jsonl")]

    process = launcher.start_line(
        ["bash", str(EXAMPLES / "torchrun" / "one_node.sh"), str(recipe)],
        PATH=programs(launcher.folder / "bin"), NPROC_PER_NODE="2", MAX_RESTARTS="2",
    )  # fmt: skip
    wait_until(lambda: len(made()) >= 4 and (launcher.folder / "checkpoints" / "latest").exists())
    rank = ranks_below(process.pid)[0]
    rank.kill()
    wait_until(lambda: not rank.is_running())
    before = made()[-1]
    wait_until(lambda: made()[-1] > before)
    process.send_signal(signal.SIGUSR1)
    ended = end_of(process)
    assert ended.code == 0, ended
    assert made() == list(range(1, steps + 1))
    told = [line.strip() for line in re.findall(r"launch: (.*)", ended.stdout)]
    assert told[1:] == [
        "attempt 1 failed: exit code 137, killed by SIGKILL; starting again, restart 1 of 2",
        "time is nearly up, asked 2 processes to save and stop",
        "attempt 2 stopped at its time limit, unfinished; starting again, restart 2 of 2",
        "attempt 3 ended well",
    ]
    assert "stopped by SIGUSR1 after" in ended.stdout and ended.stdout.count("going on from") == 2


@pytest.mark.slow
def test_ranks_that_outlive_torchrun_are_cleared_away(launcher: Launcher) -> None:
    ended = launcher.run("--max-restarts", "1", ways="orphan 0", ranks=1)
    assert ended.code == 0, ended
    orphan = int(launcher.lines(0)[0].split()[2])
    assert not psutil.pid_exists(orphan)


def test_the_wrong_words_cost_one_line(launcher: Launcher) -> None:
    ended = end_of(launcher.start("-t", "soon", ways="0"))
    assert (ended.code, ended.stdout) == (1, "")
    assert (
        ended.stderr
        == "error: --time: found 'soon', needed HH:MM:SS, D-HH:MM:SS, D-HH:MM, D-HH, MM or MM:SS, more than 0\n"
    )
    tool = [sys.executable, str(ROOT / "tools" / "launch.py"), "--local", "--", "no-such-program"]
    done = subprocess.run(tool, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert (
        done.stderr == "error: command: found 'no-such-program' (No such file or directory), needed a program on PATH\n"
    )


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a login node. FAKE_SLURM_WARNINGS: so many steps are told that their time is nearly up."""
    found = fake_slurm.install(tmp_path / "slurm")
    assert not {"SLURM_JOB_ID", "NO_SLURM"} & os.environ.keys()
    return {**found, "VILA_SLURM_ACCOUNT": "acc", "VILA_SLURM_PARTITION": "part"}


def test_a_dry_run_runs_nothing(launcher: Launcher, slurm: dict[str, str]) -> None:
    ended = launcher.run("--dry-run", "-J", "x", "-N", "2", "-t", "1-00", "-p", "fast", ways="0", **slurm)
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.count("\n") == 1
    assert ended.stdout.startswith("RUN_NAME=x OUTPUT_DIR=runs/train/x srun --account acc --partition fast --job-name ")
    assert launcher.lines() == [] and fake_slurm.calls(launcher.folder / "slurm", "srun") == []
    assert not (launcher.folder / "runs").exists()


def test_through_srun_another_allocation_follows_the_time_limit(launcher: Launcher, slurm: dict[str, str]) -> None:
    """Two nodes; the first allocation is warned, the second ends by itself."""
    ended = launcher.run(
        "-J", "x", "-N", "2", "--max-restarts", "0", ways="save save 0",
        FAKE_SLURM_WARNINGS="1", **slurm,
    )  # fmt: skip
    assert (ended.code, ended.stderr) == (0, ""), ended
    first, second = fake_slurm.calls(launcher.folder / "slurm", "srun")
    assert first == second
    assert first["options"]["--job-name"] == "acc:train/x" and first["options"]["--signal"] == "USR1@120"
    assert first["options"]["--time"] == "0-04:00:00" and first["options"]["--gpus-per-node"] == "8"
    assert first["variables"] == {"RUN_NAME": "x", "OUTPUT_DIR": "runs/train/x"}
    assert launcher.ways().count("SIGUSR1") == 2  # both nodes
    logs = launcher.folder / "runs" / "train" / "x" / "slurm"
    assert {"1000.0-0.out", "1000.0-1.out", "1001.1-0.out"} <= {path.name for path in logs.iterdir()}
    assert "running here, without SLURM (--local)" in (logs / "1000.0-1.out").read_text()


def test_through_srun_the_commands_code_comes_back(launcher: Launcher, slurm: dict[str, str]) -> None:
    ended = launcher.run("-J", "x", "-m", "eval", ways="5", **slurm)
    assert ended.code == 5
    assert len(fake_slurm.calls(launcher.folder / "slurm", "srun")) == 1  # mode eval: no restart


def test_a_batch_job_restarts_and_requeues_itself(launcher: Launcher, slurm: dict[str, str]) -> None:
    """Killed, started again inside the job, warned of the limit, requeued, done."""
    ended = launcher.run(
        "-J", "x", "--batch", "--max-restarts", "1", ways="kill save 0",
        FAKE_SLURM_WARNINGS="2", **slurm,
    )  # fmt: skip
    assert (ended.code, ended.stderr) == (0, ""), ended
    assert "Submitted batch job 77" in ended.stdout
    assert launcher.ways() == ["kill", "save", "SIGUSR1", "0"]
    folder = launcher.folder / "slurm"
    (requeue,) = fake_slurm.calls(folder, "scontrol")
    assert requeue["command"] == ["requeue", "77"]
    assert "--requeue" in fake_slurm.calls(folder, "sbatch")[0]["options"]
    assert (folder / "job_code").read_text() == "0"
    log = (launcher.folder / "runs" / "train" / "x" / "slurm" / "77.out").read_text()
    assert "attempt 1 failed: exit code 137" in log and "requeued SLURM job 77" in log and "attempt 1 ended well" in log


@pytest.fixture
def recorded(tmp_path: Path, slurm: dict[str, str]) -> dict[str, str]:
    """The environment of a node whose torchrun and megatron-vlm are known: each writes down its arguments."""
    folder = tmp_path / "slurm"
    bodies = {
        "torchrun": 'echo "$@" >> "$TORCHRUN_LOG"',
        "megatron-vlm": f'echo "$@" >> "$TORCHRUN_LOG.launches"\nexec {sys.executable} -P -m megatron_vlm "$@"',
    }
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return {**slurm, "TORCHRUN_LOG": str(tmp_path / "torchrun.log")}


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (
            "torchrun/two_nodes.sh",
            {"MASTER_ADDR": "first", "NNODES": "1:2", "NPROC_PER_NODE": "4", "JOIN_SECONDS": "9"},
            [
                "--nnodes 1:2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint first:29500 "
                "--rdzv-id megatron_vlm --rdzv-conf last_call_timeout=9"
            ],
        ),
        (
            "torchrun/n_nodes.sh",
            {"MASTER_ADDR": "first", "NNODES": "3"},
            [
                "--nnodes 3 --nproc-per-node auto --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint first:29500 "
                "--rdzv-id megatron_vlm"
            ],
        ),
        (
            "slurm/two_nodes.sbatch",
            {"FAKE_SLURM_NODES": "2", "NPROC_PER_NODE": "2"},
            [
                "--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:20077 --rdzv-id 77",
            ] * 2,
        ),
        (
            "slurm/n_nodes.sbatch",
            {"FAKE_SLURM_NODES": "3"},
            [
                "--nnodes 3 --nproc-per-node auto --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint localhost:20077 "
                "--rdzv-id 77"
            ] * 3,
        ),
    ],
)  # fmt: skip
def test_the_examples_start_torchrun(recorded: dict, script: str, variables: dict, expected: list[str]) -> None:
    """On every node, with recipe and overrides as given."""
    start = ["sbatch"] if script.endswith(".sbatch") else ["bash"]
    command = [*start, str(EXAMPLES / script), "r.yaml", "a.b=c d"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**recorded, **variables), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    lines = Path(recorded["TORCHRUN_LOG"]).read_text().splitlines()
    assert lines == [f"{line} -m megatron_vlm train r.yaml a.b=c d" for line in expected]


@pytest.mark.parametrize(
    "script", ["torchrun/one_node.sh", pytest.param("slurm/one_node.sbatch", marks=pytest.mark.slow)]
)
def test_on_one_node_the_launcher_starts_the_ranks(recorded: dict, tmp_path: Path, script: str) -> None:
    """No torchrun; what a rank says is said once by all of them, and again as the launcher's last word. Recipe and
    overrides arrive as given."""
    start = ["sbatch"] if script.endswith(".sbatch") else ["bash"]
    done = subprocess.run(
        [*start, str(EXAMPLES / script), "r.yaml", "a.b=c d"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=environment(**recorded, NPROC_PER_NODE="2", MAX_RESTARTS="0"), timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert not Path(recorded["TORCHRUN_LOG"]).exists()
    ranks = "launch --local --max-restarts 0 --ranks 2 -- train r.yaml a.b=c d"
    commands = Path(f"{recorded['TORCHRUN_LOG']}.launches").read_text().splitlines()
    outer = f"launch --local --requeue --max-restarts 3 -- srun megatron-vlm {ranks}"
    assert commands == ([ranks] if start == ["bash"] else [outer, ranks, ranks])  # again, and given up as before
    if start == ["bash"]:
        first, last = done.stderr.splitlines()
        assert done.returncode == 1 and first == last and last.startswith("error: ") and "r.yaml" in last


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_what_the_batch_scripts_ask_for(script: Path) -> None:
    options = set(re.findall(r"^#SBATCH (--[\w-]+)", script.read_text(), re.MULTILINE))
    assert {"--requeue", "--signal", "--open-mode", "--time", "--nodes", "--ntasks-per-node"} <= options
    commands = script.read_text().split("set -euo pipefail")
    assert len(commands) == 2 and "#SBATCH" not in commands[1]  # SLURM stops reading at the first command
