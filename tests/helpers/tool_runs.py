"""Runs a command line in a real process, or on ranks under torchrun, and says how it ended."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import ROOT, environment

LIMIT_SECONDS = 180


@dataclass(frozen=True)
class Done:
    """How a command ended; `stderr` of our own processes only."""

    code: int
    stdout: str
    stderr: str


def tool(name: str, *arguments: str | Path) -> Done:
    """One process."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def tool_on_ranks(num_ranks: int, logs: Path, name: str, *arguments: str | Path) -> Done:
    """Under torchrun, each rank's output in its own file, so that torchrun's report stays apart."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "--log-dir", str(logs), "--redirects=3", str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=LIMIT_SECONDS, check=False)

    def read(file: str) -> str:
        return "".join(path.read_text() for path in sorted(logs.rglob(file)))

    return Done(done.returncode, read("stdout.log"), read("stderr.log"))
