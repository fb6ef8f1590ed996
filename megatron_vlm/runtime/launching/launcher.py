"""The launcher's options made a run: here or through SLURM, with which command line, by which rules."""

import dataclasses
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.launch import WORD_FILE
from megatron_vlm.runtime.launching import slurm
from megatron_vlm.runtime.launching.restarts import TIME_IS_UP, AtTimeLimit, Rules, run_until_done
from megatron_vlm.runtime.launching.slurm import Resources, Surroundings
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)

DEFAULT_TIME = "4:00:00"  # under SLURM
TRAIN_RESTARTS = 3
LOCAL_RANKS = (sys.executable, "-P", "-m", "megatron_vlm.runtime.launching.local_ranks")


@dataclass(frozen=True)
class Request:
    """The options of `megatron-vlm launch` as given."""

    command: tuple[str, ...]
    launcher: tuple[str, ...]  # the words that start `megatron-vlm launch`, which each node runs
    job_name: str | None = None
    mode: str = "train"
    output_dir: str | None = None
    time: str | None = None
    save_seconds: int = 120
    quick_seconds: int = 60
    max_restarts: int | None = None
    account: str | None = None
    partition: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    slurm_options: tuple[str, ...] = ()
    batch: bool = False
    local: bool = False
    requeue: bool = False
    ranks: str | None = None  # on this machine, or auto


@dataclass(frozen=True)
class Plan:
    """The run to start: variables for its environment, the line, how it is watched; `why_local` None: through SLURM."""

    variables: dict[str, str]
    line: list[str]
    rules: Rules
    why_local: str | None = None

    def shell_line(self) -> str:
        """The line for a shell."""
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), shlex.join(self.line)]
        )


def make_plan(request: Request, surroundings: Surroundings) -> Plan:
    """Decides everything, touches nothing.

    Raises:
        ConfigError: what the user must say first.
    """
    if not request.command:
        raise ConfigError("command: found nothing to run, needed: launch.py [options] -- COMMAND ...")
    submitter = "sbatch" if request.batch else "srun"
    why_local = "--local" if request.local else surroundings.why_local(submitter)
    if request.requeue and surroundings.job_id is None:
        raise ConfigError("--requeue: found no SLURM_JOB_ID, needed a SLURM batch job")
    seconds = slurm.parse_time(request.time or DEFAULT_TIME)
    if seconds <= request.save_seconds or request.save_seconds > slurm.MAX_SIGNAL_SECONDS:
        raise ConfigError(
            f"--save-seconds: found {request.save_seconds}, needed less than --time ({seconds}) and at most "
            f"{slurm.MAX_SIGNAL_SECONDS}"
        )
    if request.job_name is not None:
        request = dataclasses.replace(request, job_name=request.job_name.replace("%t", time.strftime("%Y%m%d%H%M%S")))
    if request.ranks is not None:
        if request.nodes > 1:
            raise ConfigError(f"--ranks: found {request.nodes} nodes, needs one; on several torchrun starts the ranks")
        request = dataclasses.replace(request, command=(*LOCAL_RANKS, request.ranks, *request.command))
    variables = run_variables(request)
    restarts = (
        (TRAIN_RESTARTS if request.mode == "train" else 0) if request.max_restarts is None else request.max_restarts
    )
    if why_local is not None:
        at_limit: AtTimeLimit = "leave" if request.requeue or surroundings.job_id else "count"
        rules = Rules(
            restarts, at_limit, seconds if request.time else None, request.save_seconds, request.quick_seconds
        )
        return Plan(variables, list(request.command), rules, why_local)
    resources = make_resources(request, surroundings, variables, seconds)
    if request.batch:
        return Plan(variables, slurm.sbatch_line(resources, request.launcher, request.command, restarts), Rules())
    return Plan(
        variables,
        slurm.srun_line(resources, request.launcher, request.command),
        Rules(restarts, "free", quick_seconds=request.quick_seconds),
    )


def run_variables(request: Request) -> dict[str, str]:
    """RUN_NAME and OUTPUT_DIR, as vila-run exports them, where there is a name."""
    directory = request.output_dir
    if request.job_name is None:
        return {"OUTPUT_DIR": directory} if directory else {}
    return {"RUN_NAME": request.job_name, "OUTPUT_DIR": directory or f"runs/{request.mode}/{request.job_name}"}


def make_resources(request: Request, surroundings: Surroundings, variables: dict[str, str], seconds: int) -> Resources:
    """Makes the request to SLURM. Raises ConfigError where it lacks a name, an account or a partition."""
    if request.job_name is None:
        raise ConfigError("--job-name: found none, needed one for SLURM; --local runs without SLURM")
    account, partition = surroundings.account_and_partition(request.account, request.partition)
    return Resources(
        account, partition, f"{account}:{request.mode}/{request.job_name}", variables["OUTPUT_DIR"], seconds,
        request.save_seconds, request.nodes, request.gpus_per_node, request.slurm_options,
    )  # fmt: skip


def launch(plan: Plan, requeue: bool, surroundings: Surroundings) -> int:
    """Runs a plan to its end and returns the exit code; sbatch's end is that the job is in the queue.

    Raises:
        ConfigError: no such program, no directory for the logs, a requeue that SLURM refused.
    """
    environment = {**surroundings.environment, **plan.variables}
    if plan.why_local is None:
        _make_directory(Path(plan.variables["OUTPUT_DIR"]) / "slurm")
        logger.info("launch: %s", plan.shell_line())
    else:
        logger.info("launch: running here, without SLURM (%s): %s", plan.why_local, plan.shell_line())
    if plan.line[0] == "sbatch":
        return subprocess.run(plan.line, env=environment, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        word = Path(folder) / "word"
        code = run_until_done(plan.line, {**environment, WORD_FILE: str(word)}, plan.rules)
        if code and word.exists():
            sys.stderr.write(f"{word.read_text(errors='replace')}\n")  # once more, as the last
    if code == TIME_IS_UP and requeue:
        slurm.requeue(surroundings)
        logger.info("launch: requeued SLURM job %s", surroundings.job_id)
    return code


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)  # SLURM would drop the logs silently
    except OSError as error:
        raise ConfigError(f"--output-dir: {path} cannot be made: {error.strerror}") from error
