"""Runs inputs, each in a forked process of its own, and judges what came of them.

The heavy imports are made once, before the first fork, so an input costs some 30 ms and what reading it costs. Limits:
60 s of processor time; a process that sleeps 20 s on end waits for what never comes; 2 GiB of memory beyond what the
imports take (4 GiB of address space, where allocation fails). All of them are judged by processor time and by what the
kernel counts, so that a busy machine is not taken for a fault.

Hazard: threads do not survive a fork, so nothing here may have started one: no process group before it.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from tests.fuzz.kind import Kind
from tests.fuzz.verdicts import LONGEST_TOLD, Verdict, not_shown, of_error
from tests.fuzz.walls import Walls

SECRET = "fuzz-secret-4711"  # in a file outside, and in the environment: no reader may show it
POLL_SECONDS = 0.004


@dataclass(frozen=True)
class Limits:
    """Of one input. address_bytes: beyond what the imports take, where allocations fail."""

    processor_seconds: int = 60
    sleep_seconds: float = 20.0
    wall_seconds: float = 900.0
    memory_bytes: int = 2 << 30
    address_bytes: int = 4 << 30


@dataclass(frozen=True)
class Task:
    """Which input: all there is to make it again."""

    kind: Kind
    seed: int
    index: int

    def __str__(self) -> str:
        return f"--kind {self.kind.name} --seed {self.seed} --index {self.index}"


@dataclass
class Running:
    """An input's process."""

    task: Task
    place: Path
    pid: int
    pipe: int
    listener: socket.socket
    outside: dict[str, tuple[int, ...]]
    started: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    ticks: int = -1
    ran: float = field(default_factory=time.monotonic)  # when it was last seen at work


def run(
    tasks: Iterable[Task], bases: dict[str, Any], folder: Path, jobs: int = 1, limits: Limits = Limits()
) -> Iterator[tuple[Task, Verdict, Path, float]]:
    """Runs inputs, `jobs` at a time, in the order in which they end.

    Args:
        bases: what each kind's `prepare` gave.
        folder: each input has a place of its own there, which the caller removes.

    Yields:
        The task, its verdict, its place, and the seconds of processor time it took.
    """
    waiting, running = iter(tasks), list[Running]()
    gc.collect()
    gc.freeze()  # a child that collects would copy every page that the imports take
    while True:
        while len(running) < jobs and (task := next(waiting, None)) is not None:
            running.append(_start(task, bases[task.kind.name], folder, limits))
        if not running:
            return
        for one in list(running):
            pid, status, usage = os.wait4(one.pid, os.WNOHANG)
            if pid == 0:
                _watch(one, limits)
                continue
            running.remove(one)
            yield one.task, _judge(one, status, usage, limits), one.place, _seconds(usage)
        time.sleep(POLL_SECONDS)


def _start(task: Task, base: Any, folder: Path, limits: Limits) -> Running:
    place = Path(tempfile.mkdtemp(prefix=f"{task.kind.name}-{task.seed}-{task.index}-", dir=folder))
    for name in ("inside", "outside", "tmp"):
        (place / name).mkdir()
    (place / "outside" / "secret.txt").write_text(SECRET)
    (place / "outside" / "secret.yaml").write_text(f"logging: {{run_name: {SECRET}}}\n")
    (place / "outside" / "secret.json").write_text(json.dumps({"secret": SECRET}))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    (place / "port").write_text(str(listener.getsockname()[1]))
    outside = _listing(place / "outside")
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _read_in_child(task, base, place, writer, limits)
    os.close(writer)
    return Running(task, place, pid, reader, listener, outside)


def _read_in_child(task: Task, base: Any, place: Path, pipe: int, limits: Limits) -> NoReturn:
    """Makes the input, reads it behind the walls, says what came of it, and ends this process."""
    with contextlib.suppress(BaseException):
        os.setsid()
        with open(place / "output", "wb") as output, open(os.devnull, "rb") as nothing:
            for number, file in ((0, nothing), (1, output), (2, output)):
                os.dup2(file.fileno(), number)

        def tell(kind: str, told: str) -> None:
            os.write(pipe, (json.dumps([kind, told[-LONGEST_TOLD:]]) + "\n").encode())

        try:
            tempfile.tempdir = str(place / "tmp")
            read = task.kind.make(Random(f"{task.kind.name} {task.seed} {task.index}"), base, place / "inside")
            os.chdir(place / "inside")
            before = _prepare_limits(limits)
            Walls(place, task.kind.may_read_outside, tell).raise_them()
        except BaseException as error:
            tell("no input", of_error(error).told)
            os._exit(0)
        try:
            read()
            verdict = Verdict("accepted")
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            verdict = of_error(error)
        peak = _status_bytes("VmHWM") - before
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        if max(peak, children) > limits.memory_bytes:
            tell("memory", f"{max(peak, children):,} bytes; {verdict.kind}: {verdict.told}")
        tell(verdict.kind, verdict.told)
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(0)


def _prepare_limits(limits: Limits) -> int:
    """Sets them in this process, and returns the memory it has in bytes: the peak is counted from here."""
    os.environ["FUZZ_SECRET"] = SECRET
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + limits.processor_seconds, spent + limits.processor_seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    address_bytes = _status_bytes("VmSize") + limits.address_bytes
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes, resource.RLIM_INFINITY))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak becomes what is there now
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def _watch(one: Running, limits: Limits) -> None:
    """Ends a process that waits for what never comes."""
    now = time.monotonic()
    if now - one.started < 2 or now - one.looked < 0.5:
        return
    one.looked = now
    ticks, at_work = _work_of(one.pid)
    if ticks != one.ticks or at_work:
        one.ticks, one.ran = ticks, now
    if now - one.ran > limits.sleep_seconds or now - one.started > limits.wall_seconds:
        os.killpg(one.pid, signal.SIGKILL)


def _work_of(session: int) -> tuple[int, bool]:
    """Processor time of a session's processes, and whether one of them runs or waits for a disk."""
    ticks, at_work = 0, False
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            states = [Path(task, "stat").read_text().rpartition(")")[2].split()[0]
                      for task in Path("/proc", entry, "task").iterdir()]  # fmt: skip
        except (OSError, IndexError):  # it ended meanwhile
            continue
        ticks += int(fields[11]) + int(fields[12])
        at_work = at_work or any(state in "RD" for state in states)
    return ticks, at_work


def _judge(one: Running, status: int, usage: resource.struct_rusage, limits: Limits) -> Verdict:
    """The worst of what the process said and of what can be seen."""
    left_over = True
    try:
        os.killpg(one.pid, signal.SIGKILL)
    except ProcessLookupError:
        left_over = False
    with os.fdopen(one.pipe, "rb") as pipe:
        said = [Verdict(*json.loads(line)) for line in pipe.read().splitlines() if line.endswith(b"]")]
    found = [verdict for verdict in said if verdict.is_fault]
    ended = os.waitstatus_to_exitcode(status)
    if ended == -signal.SIGXCPU or (ended == -signal.SIGKILL and _seconds(usage) > limits.processor_seconds):
        found.append(Verdict("block", f"more than {limits.processor_seconds} s of processor time"))
    elif ended == -signal.SIGKILL:
        found.append(Verdict("block", f"it waited {time.monotonic() - one.ran:.0f} s without working"))
    elif ended or not said:
        found.append(Verdict("crash", f"exit code {ended} without a word"))
    if left_over:
        found.append(Verdict("code run", "a process was left over"))
    if _listing(one.place / "outside") != one.outside:
        found.append(Verdict("file outside", "what lies outside has changed"))
    with contextlib.suppress(BlockingIOError):
        one.listener.accept()[0].close()
        found.append(Verdict("network", "the port named in the input was asked"))
    one.listener.close()
    printed = (one.place / "output").read_bytes()[-1_000_000:].decode("utf-8", "backslashreplace")
    if bad := not_shown(printed.replace("\r", "")):
        found.append(Verdict("not one line", f"on stderr: {bad!r} in {printed[-LONGEST_TOLD:]!r}"))
    order = ("code run", "network", "file outside")
    found.sort(key=lambda verdict: order.index(verdict.kind) if verdict.kind in order else len(order))
    return found[0] if found else said[-1]


def _seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _listing(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every file below, as it is now."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def remove(place: Path) -> None:
    """An input's place, whatever it made of its permissions."""
    shutil.rmtree(place, ignore_errors=True)
