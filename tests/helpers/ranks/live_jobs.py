"""Training jobs as real processes that can be watched and signalled while they run, and run in the pool for comparison.

A job is known by a variable in its environment, which every process it starts inherits: agent, ranks, fork servers,
data workers, writers, whatever session or parent they end up with.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_vlm.config.schema import Config
from megatron_vlm.runtime.signals import StopSignals
from tests.helpers.ranks.processes import ROOT, environment

MARK = "MEGATRON_VLM_LIVE_JOB"
START_SECONDS = 120.0  # imports and the first step, on a busy machine
GONE_SECONDS = 30.0  # DESIGN 5: everyone is gone this long after the end
TRAIN = ROOT / "tools" / "train.py"


class LiveJob:
    """A script under torchrun, or without where there is one rank. Used as a context it leaves nothing behind.

    Args:
        logs: a new folder for the ranks' output.
        command: script and arguments.
        num_ranks: 1 starts the script itself.
        ours: by tools/launch.py, not torchrun; what ranks say is then the launcher's output.
        inside: a command that runs the one behind it.
    """

    def __init__(
        self,
        logs: Path,
        command: Sequence[str | Path],
        num_ranks: int = 1,
        ours: bool = False,
        inside: Sequence[str] = (),
    ) -> None:
        logs.mkdir(parents=True)
        self.logs, self.mark = logs, uuid.uuid4().hex
        launcher = [sys.executable]
        if ours:
            launcher += [str(ROOT / "tools" / "launch.py"), "--local", "--max-restarts", "0"]
            launcher += ["--ranks", str(num_ranks), "--"]
        elif num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
            launcher += ["--log-dir", str(logs / "ranks"), "--redirects=3"]
        with open(logs / "stdout.log", "w") as out, open(logs / "stderr.log", "w") as err:
            self.process = subprocess.Popen(
                [*inside, *launcher, *map(str, command)],
                env=environment(**{MARK: self.mark}),
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_as_by_a_launcher,
            )
        self.own_logs = logs / "ranks" if num_ranks > 1 and not ours else logs

    def __enter__(self) -> "LiveJob":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()

    def processes(self) -> list[psutil.Process]:
        """All that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def listening(self, number: signal.Signals) -> list[psutil.Process]:
        """Those that have a handler for a signal, by the kernel's word."""
        found = []
        for process in self.processes():
            status = Path(f"/proc/{process.pid}/status")
            masks = dict(line.split(":\t") for line in status.read_text().splitlines()) if status.exists() else {}
            if int(masks.get("SigCgt", "0"), 16) >> (number - 1) & 1:
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """By number, where they listen for signals to save."""
        listeners = [process for process in self.listening(signal.SIGUSR1) if "RANK" in process.environ()]
        of_script = [process for process in listeners if not {"-c", "-m"} & set(process.cmdline())]
        return sorted(of_script, key=lambda process: int(process.environ()["RANK"]))

    def end(self, limit_seconds: float = START_SECONDS) -> int:
        """Waits for the end of all its processes; the exit code. Fails where some stay."""
        code = self.process.wait(limit_seconds)
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left over: {[' '.join(process.cmdline()) for process in left]}"
        return code

    def read(self, name: str) -> str:
        """stdout.log or stderr.log of our own processes, in rank order."""
        return "".join(path.read_text() for path in sorted(self.own_logs.rglob(name)))

    @property
    def stdout(self) -> str:
        """What was told, in one line: a console breaks long ones."""
        return " ".join(self.read("stdout.log").split())


def wait_for(what: str, condition: Any, limit_seconds: float = START_SECONDS) -> None:
    """Until `condition()` is true; fails after the limit."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_seconds:.0f} s"
        time.sleep(0.02)


def read_metrics(root: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = root / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def train_in_pool(recipe: dict[str, Any], signals: StopSignals | None = None) -> None:
    """Inside a rank: the whole run, as tools/train.py makes it; maybe with signals noted meanwhile."""
    import torch.distributed as dist

    from megatron_vlm.runtime.distributed import Launch
    from megatron_vlm.training.loop import train

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    train(Config.model_validate(recipe), Launch(rank, num_ranks, rank, num_ranks), signals)


def _as_by_a_launcher() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # torchrun would die of it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the tests' own process may have begun without
    os.umask(0o022)
