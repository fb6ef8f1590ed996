"""Runs a command line in a process of its own, or on ranks under torchrun, and says how it ended.

`warm_tool` is for tests of what a command says or makes: its process is forked after the imports
(`tests/helpers/ranks/warm.py`). A test of what is imported, warned of or left behind uses `tool`.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks.processes import ROOT, environment
from tests.helpers.ranks.warm import run_warm

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


def warm_tool(name: str, *arguments: str | Path | int) -> Done:
    """One process that finds its imports done."""
    words = [str(ROOT / "tools" / name), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as logs:
        code = run_warm(_run_script, words, logs, variables=environment())
        return Done(code, *((Path(logs) / name).read_text() for name in ("stdout", "stderr")))


def _run_script(words: list[str], logs: str) -> None:
    """Makes this process what `python` with these words would be."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(logs, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = words
    code: int | str | None = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:  # whatever it is, as Python would tell it
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, before what atexit has
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def tool_on_ranks(num_ranks: int, logs: Path, name: str, *arguments: str | Path) -> Done:
    """Under torchrun, each rank's output in its own file, so that torchrun's report stays apart."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "--log-dir", str(logs), "--redirects=3", str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=LIMIT_SECONDS, check=False)

    def read(file: str) -> str:
        return "".join(path.read_text() for path in sorted(logs.rglob(file)))

    return Done(done.returncode, read("stdout.log"), read("stderr.log"))
