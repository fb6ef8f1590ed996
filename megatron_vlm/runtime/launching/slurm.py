"""SLURM's side of a launch: srun and sbatch lines, times as SLURM writes them, the surroundings of this process.

The command is not the SLURM task itself: each node's task is this launcher again (`--local`), because SLURM signals the
tasks and not what they start, and torchrun dies of SIGUSR1. It asks its node's ranks to save, and ends with TIME_IS_UP,
which srun passes on to whoever started it: the launcher on the login node, which asks for the next allocation, or the
one in the batch script, which requeues the job.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.launching.command import SAVE

UNITS_SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
FORMS = (  # of sbatch's manual, in the order in which they can be told apart
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
)
WAIT_SECONDS = 60  # for the other nodes once one has ended
MAX_SIGNAL_SECONDS = 65_535


def parse_time(text: str) -> int:
    """Seconds of a time in one of SLURM's forms: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    Raises:
        ConfigError: anything else, and a time of nothing.
    """
    for form in FORMS:
        if found := re.fullmatch(form, text):
            seconds = sum(int(value) * UNITS_SECONDS[unit] for unit, value in found.groupdict().items() if value)
            if seconds:
                return seconds
    raise ConfigError(f"--time: found {text!r}, needed HH:MM:SS, D-HH:MM:SS, D-HH:MM, D-HH, MM or MM:SS, more than 0")


def format_time(seconds: int) -> str:
    """D-HH:MM:SS."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


@dataclass(frozen=True)
class Surroundings:
    """The environment of this process, taken before anything changes it, and what it says."""

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def job_id(self) -> str | None:
        """The allocation this process is in."""
        return self.environment.get("SLURM_JOB_ID")

    def why_local(self, submitter: str) -> str | None:
        """Reason why SLURM is not asked, or None where it is. `submitter`: srun or sbatch."""
        if self.environment.get("NO_SLURM"):
            return "NO_SLURM is set"
        if self.job_id:
            return f"inside SLURM job {self.job_id}"
        if shutil.which(submitter, path=self.environment.get("PATH")) is None:
            return f"no {submitter} on PATH"
        return None

    def account_and_partition(self, account: str | None, partition: str | None) -> tuple[str, str]:
        """Options win over the environment. Raises ConfigError where neither says."""
        found = {
            "--account or VILA_SLURM_ACCOUNT": account or self.environment.get("VILA_SLURM_ACCOUNT"),
            "--partition or VILA_SLURM_PARTITION": partition or self.environment.get("VILA_SLURM_PARTITION"),
        }
        missing = [name for name, value in found.items() if not value]
        if missing:
            raise ConfigError(f"SLURM: found no {' and no '.join(missing)}; --local runs without SLURM")
        first, second = found.values()
        assert first and second
        return first, second


@dataclass(frozen=True)
class Resources:
    """Resources that a job asks SLURM for. `name` is the whole job name; `directory` holds its logs in slurm/."""

    account: str
    partition: str
    name: str
    directory: str
    seconds: int
    save_seconds: int
    nodes: int = 1
    gpus_per_node: int = 8  # 0: not asked for, for clusters that do not know the option
    options: tuple[str, ...] = ()  # any others, as they are

    def allocation(self) -> list[str]:
        """Options that srun and sbatch share."""
        gpus = ["--gpus-per-node", str(self.gpus_per_node)] if self.gpus_per_node else []
        return [
            "--account", self.account, "--partition", self.partition, "--job-name", self.name,
            "--nodes", str(self.nodes), "--ntasks-per-node", "1", *gpus, "--time", format_time(self.seconds),
            "--exclusive", f"--signal={SAVE.name.removeprefix('SIG')}@{self.save_seconds}", *self.options,
        ]  # fmt: skip

    def step(self) -> list[str]:
        """Options of the step that runs the command, one task per node, and of its logs."""
        logs = f"{self.directory}/slurm/%J-%t"
        return [
            "--output",
            f"{logs}.out",
            "--error",
            f"{logs}.err",
            "--open-mode",
            "append",
            "--wait",
            f"{WAIT_SECONDS}",
        ]


def srun_line(resources: Resources, launcher: Sequence[str], command: Sequence[str]) -> list[str]:
    """An allocation and the command in it, as one blocking srun."""
    return ["srun", *resources.allocation(), *resources.step(), *_on_each_node(launcher), *command]


def sbatch_line(resources: Resources, launcher: Sequence[str], command: Sequence[str], max_restarts: int) -> list[str]:
    """A batch job that restarts the command after failures and requeues itself at its time limit."""
    step = ["srun", "--ntasks-per-node", "1", *resources.step(), *_on_each_node(launcher), *command]
    outer = [*launcher, "--local", "--requeue", "--max-restarts", str(max_restarts), "--", *step]
    log = ["--output", f"{resources.directory}/slurm/%j.out", "--open-mode", "append"]
    return ["sbatch", *resources.allocation(), *log, "--requeue", "--wrap", f"exec {shlex.join(outer)}"]


def _on_each_node(launcher: Sequence[str]) -> list[str]:
    return [*launcher, "--local", "--max-restarts", "0", "--"]


def requeue(surroundings: Surroundings) -> None:
    """Puts this process' own batch job back into the queue.

    Raises:
        ConfigError: not in a job, or SLURM refused.
    """
    if surroundings.job_id is None:
        raise ConfigError("--requeue: found no SLURM_JOB_ID, needed a SLURM batch job")
    command = ["scontrol", "requeue", surroundings.job_id]
    try:
        done = subprocess.run(command, env=surroundings.environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--requeue: {shlex.join(command)} did not run: {error.strerror}") from error
    if done.returncode:
        raise ConfigError(f"--requeue: {shlex.join(command)} failed with {done.returncode}: {done.stderr.strip()}")
