"""A fork server that is a fork of its rank: what its children find, what they do not, and when it is left alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.ranks.processes import ROOT, environment

END_SECONDS = 20.0
COSTLY = 'import os\nwith open(os.environ["IMPORTED"], "a") as file:\n    file.write(f"{os.getpid()}\\n")\n'
SCRIPT = """
import json, multiprocessing, os, signal, threading, time
from multiprocessing import forkserver
from megatron_vlm.runtime import device, fork_server
from megatron_vlm.runtime.signals import BeginAsChild, StopSignals, SIGNALS, kept_from_children

context = multiprocessing.get_context("forkserver")

def found():
    import costly
    handles = [f"/proc/self/fd/{{name}}" for name in os.listdir("/proc/self/fd")]
    return dict(
        parent=os.getppid(), later=os.environ.get("LATER"), early=os.environ.get("EARLY"),
        opened=any("ranks_own" in os.readlink(handle) for handle in handles if os.path.exists(handle)),
        deaf=signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(SIGNALS),
        handlers=[getattr(one, '__name__', str(one)) for one in map(signal.getsignal, SIGNALS)],
    )

def multiplied():
    import numpy
    return float((numpy.ones((500, 500)) @ numpy.ones((500, 500)))[0, 0])

def call(begin, function, pipe):
    begin()
    pipe.send(function())

def in_a_child(function):
    ours, theirs = context.Pipe()
    with kept_from_children(with_tracker=True):
        process = context.Process(target=call, args=(BeginAsChild(), function, theirs))
        process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    assert process.exitcode == 0
    return answer

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without
    own = open(os.environ["IMPORTED"] + "ranks_own", "w")
    with StopSignals() as stop:
{before}
        fork_server.start_forked(["costly"], stop)
        server = forkserver._forkserver
{after}
"""


def start(folder: Path, after: str, before: str = "", **variables: str) -> subprocess.Popen[str]:
    """Runs a script that starts its server, and the lines `before` and `after` that. The module `costly` writes down
    which processes import it."""
    (folder / "costly.py").write_text(COSTLY)
    indented = {name: text.replace("\n", "\n        ") for name, text in (("before", before), ("after", after))}
    (folder / "script.py").write_text(SCRIPT.format(**{name: f"        {text}" for name, text in indented.items()}))
    given = environment(IMPORTED=str(folder / "imported"), **variables)
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py")], env=given, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end_of(process: subprocess.Popen[str]) -> str:
    """What it said, in one line."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return " ".join(out.split())


def importers(folder: Path) -> set[int]:
    return {int(line) for line in (folder / "imported").read_text().splitlines()}


def test_nothing_is_imported_twice_or_said_twice(tmp_path: Path) -> None:
    after = "for _ in range(2): print(in_a_child(found)['parent'] == server._forkserver_pid)"
    process = start(tmp_path, after, before="print('once')")
    assert end_of(process) == "once True True"
    assert importers(tmp_path) == {process.pid}


@pytest.mark.parametrize("forked", [True, False])
def test_children_find_what_those_of_multiprocessings_own_server_do(tmp_path: Path, forked: bool) -> None:
    """The environment of the moment, no handle of the rank's, no signal that asks it to save."""
    before = "" if forked else "with kept_from_children(with_tracker=True): forkserver.ensure_running()"
    after = (
        "os.environ['LATER'] = 'x'\ndel os.environ['EARLY']\nchild = in_a_child(found)\n"
        "print(server._forkserver_pid == child.pop('parent'), json.dumps(child))"
    )
    told = end_of(start(tmp_path, after, before, EARLY="y"))
    of_a_server, _, child = told.removeprefix(told.partition("True")[0]).partition(" ")
    handlers = [str(int(signal.SIG_DFL)), str(int(signal.SIG_DFL)), "default_int_handler"]
    assert of_a_server == "True"
    assert json.loads(child) == {"later": "x", "early": None, "opened": False, "deaf": True, "handlers": handlers}
    assert len(importers(tmp_path)) == 1 + (not forked)  # the other server's child imports it anew


def test_threads_that_numpy_starts_are_no_obstacle(tmp_path: Path) -> None:
    """OpenBLAS ends its own for the fork."""
    after = "print(in_a_child(multiplied), server._forkserver_pid == in_a_child(found)['parent'])"
    process = start(tmp_path, after, OMP_NUM_THREADS="4")
    assert end_of(process) == "500.0 True"
    assert importers(tmp_path) == {process.pid}


OBSTACLES = {
    "a thread": (
        "threading.Thread(target=time.sleep, args=(60,), daemon=True, name='of an extension').start()",
        "thread of an extension runs",
    ),
    "a library's threads": ("fork_server._threads_of_numpy = lambda: -1", "1 threads run that a library has started"),
    "a GPU": ("gpu = open('/dev/zero'); fork_server.GPU_FILES = ('/dev/zero',)", "a GPU is in use"),
    "a device": ("device._prepared = 'cuda'", "the device is prepared"),
    "a server": ("forkserver.ensure_running()", "there is a fork server already"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_against_a_fork_leaves_multiprocessings_own_server(tmp_path: Path, obstacle: str) -> None:
    before, reason = OBSTACLES[obstacle]
    process = start(tmp_path, "print(in_a_child(found)['later'])", f"{before}\nos.environ['LATER'] = 'x'")
    told = end_of(process)
    assert f"data workers and checkpoint writers import everything once more: {reason}" in told and told.endswith("x")
    assert len(importers(tmp_path)) == 2


def test_the_server_ends_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "print(server._forkserver_pid, flush=True)\ntime.sleep(60)")
    assert process.stdout is not None
    server = psutil.Process(int(process.stdout.readline()))
    assert server.is_running() and server.pid != process.pid and server.ppid() == process.pid
    process.kill()
    process.communicate()
    server.wait(END_SECONDS)


def test_a_signal_that_comes_during_the_fork_is_noted_after_it(tmp_path: Path) -> None:
    after = "stop.arm()\nwith stop.paused(): os.kill(os.getpid(), signal.SIGUSR1); time.sleep(0.3); print(stop.seen)\n"
    after += "while not stop.seen: time.sleep(0.01)\nprint(stop.seen == signal.SIGUSR1)"
    told = end_of(start(tmp_path, after))
    assert told.startswith("0 ") and told.endswith("True")
