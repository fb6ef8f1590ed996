"""srun, sbatch and scontrol for a machine without SLURM: they write down how they were called and run the command here.

`install` puts them into a folder for PATH. What they do as SLURM does: one task per node, with its output where the
options say; the warning signal goes to the tasks and not to what they started; the highest exit code is srun's; a
requeued batch job runs again under its number. What not: sbatch returns only when the job is through.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = "77"
FLAGS = {"--exclusive", "--requeue"}


def install(folder: Path) -> dict[str, str]:
    """Makes the commands in `folder`; returns the environment in which they are found."""
    folder.mkdir()
    for name in ("srun", "sbatch", "scontrol"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def calls(folder: Path, name: str) -> list[dict]:
    """How a command was called, call by call: `options`, `command`, `variables`."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options (a flag's value is empty) and the command after them."""
    options, place = {}, 0
    while place < len(arguments) and arguments[place].startswith("-"):
        name, equals, value = arguments[place].partition("=")
        takes_next = not equals and name not in FLAGS
        options[name] = arguments[place + 1] if takes_next else value
        place += 2 if takes_next else 1
    return options, arguments[place:]


def main() -> None:
    """Plays the command named first."""
    folder, name, arguments = Path(os.environ["FAKE_SLURM"]), sys.argv[1], sys.argv[2:]
    options, command = split(arguments)
    variables = {key: os.environ[key] for key in ("RUN_NAME", "OUTPUT_DIR", "SLURM_JOB_ID") if key in os.environ}
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"options": options, "command": command, "variables": variables}) + "\n")
    sys.exit({"srun": srun, "sbatch": sbatch, "scontrol": scontrol}[name](options, command, folder))


def srun(options: dict[str, str], command: list[str], folder: Path) -> int:
    """Runs the tasks; the first FAKE_SLURM_WARNINGS steps get the signal of --signal."""
    num_tasks = int(options.get("--nodes") or os.environ.get("SLURM_NNODES", "1"))
    step = len(calls(folder, "srun")) - 1
    job = os.environ.get("SLURM_JOB_ID", str(1000 + step))
    tasks = []
    for number in range(num_tasks):
        names = {"%J": f"{job}.{step}", "%t": str(number)}
        environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_PROCID": str(number), "SLURM_NNODES": str(num_tasks)}
        tasks.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=_open(options.get("--output"), names),
                stderr=_open(options.get("--error"), names),
            )
        )
    warning = options.get("--signal") or os.environ.get("FAKE_SLURM_SIGNAL")
    if warning and step < int(os.environ.get("FAKE_SLURM_WARNINGS", "0")):
        for task in tasks:
            _send_when_caught(task, signal.Signals[f"SIG{warning.partition('@')[0]}"])
    return max(task.wait() for task in tasks)


def _send_when_caught(task: subprocess.Popen, signum: int) -> None:
    """Not before the task has a handler: SLURM's warning comes long after the start."""
    while task.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{task.pid}/status").read_text())
        if caught and int(caught[1], 16) >> (signum - 1) & 1:
            task.send_signal(signum)
            return
        time.sleep(0.1)


def sbatch(options: dict[str, str], command: list[str], folder: Path) -> int:
    """Runs the wrapped line or the script, again and again while it is requeued."""
    body = ["/bin/sh", "-c", options["--wrap"]] if "--wrap" in options else ["/bin/bash", *command]
    nodes = options.get("--nodes") or os.environ.get("FAKE_SLURM_NODES", "1")
    environment = {**os.environ, "SLURM_JOB_ID": JOB, "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": f"node[1-{nodes}]"}
    environment["FAKE_SLURM_SIGNAL"] = options.get("--signal", "USR1")
    requeued = folder / "requeued"
    requeued.touch()
    while requeued.exists():
        requeued.unlink()
        done = subprocess.run(body, env=environment, stdout=_open(options.get("--output"), {"%j": JOB}), check=False)
        (folder / "job_code").write_text(str(done.returncode))
    print(f"Submitted batch job {JOB}")
    return 0


def scontrol(options: dict[str, str], command: list[str], folder: Path) -> int:
    """requeue JOB; show hostnames LIST (this machine, as often as there are nodes)."""
    if command[0] == "requeue":
        (folder / "requeued").touch()
    else:
        print("\n".join(["localhost"] * int(os.environ.get("SLURM_NNODES", "1"))))
    return 0


def _open(pattern: str | None, names: dict[str, str]) -> int | None:
    if pattern is None:
        return None
    for placeholder, value in names.items():
        pattern = pattern.replace(placeholder, value)
    return os.open(pattern, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


if __name__ == "__main__":
    main()
