"""A running command and the processes below it: who is told of a signal, how it is ended, its exit code.

torchrun starts its ranks in sessions of their own, dies of SIGUSR1, and gives its ranks 30 seconds after a SIGTERM: too
little for a large checkpoint. So a signal that asks for a last checkpoint goes to the ranks themselves (the processes
with RANK in their environment), past torchrun, and only to those that listen, by the mask the kernel shows in
/proc/PID/status: a rank that still imports libraries would die of it.

The hazard: a job manager may send SIGUSR1 to every process of a job. The command is started with the signal ignored,
which its children inherit until they install a handler, so that this ends nobody.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.launch import WORD_FILE

SAVE = signal.SIGUSR1
END_SECONDS = 45.0  # from SIGTERM to SIGKILL; torchrun itself waits 30 for its ranks


class Command:
    """A command, running.

    Args:
        arguments: program and arguments; nothing is expanded by a shell.
        environment: its whole environment.

    Raises:
        ConfigError: there is no such program.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        reads = subprocess.DEVNULL if os.isatty(0) else None  # to read a terminal would stop a process of another group
        try:  # an own process group: the terminal's Ctrl-C reaches the command once, through the launcher
            self._process = subprocess.Popen(
                arguments, env=environment, stdin=reads, process_group=0, preexec_fn=_ignore_save
            )
        except OSError as error:
            raise ConfigError(
                f"command: found {arguments[0]!r} ({error.strerror}), needed a program on PATH"
            ) from error
        self._root = psutil.Process(self._process.pid)
        self._word_file = environment.get(WORD_FILE)
        self._told: set[tuple[int, int]] = set()
        self._ranks: set[psutil.Process] = set()  # seen so far

    def wait(self, seconds: float) -> int | None:
        """The exit code as a shell gives it (128 + signal where one ended the command), or None after the time."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def note_ranks(self) -> None:
        """Notes which processes are ranks; called now and then: the tree does not have them once torchrun is gone."""
        self._ranks.update(filter(_is_rank, self._tree()))

    def tell(self, signum: int, ranks_only: bool = False) -> int:
        """Sends a signal to every listener, once in its life; returns how many were told now."""
        tree = self._tree()
        found = listeners(list(filter(_is_rank, tree)) if ranks_only else tree, signum)
        new = [process for process in found if (process.pid, signum) not in self._told]
        for process in new:
            self._told.add((process.pid, signum))
            _send(process, signum)
        return len(new)

    def send(self, signum: int) -> None:
        """Sends a signal to the command's process group, as Ctrl-C would; torchrun passes it on to its ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def end(self) -> None:
        """Ends the command and everything below it: SIGTERM, and SIGKILL for what is left after END_SECONDS."""
        tree = self._tree()
        self.send(signal.SIGTERM)
        self.wait(END_SECONDS)
        for process in {*tree, *self._tree()}:
            _send(process, signal.SIGKILL)
        self._process.wait()

    def clear_away(self) -> None:
        """Kills ranks that outlived the command (a killed torchrun leaves them), for they would go on writing."""
        for process in {*self._ranks, *self._orphans()}:
            _send(process, signal.SIGKILL)

    def _orphans(self) -> list[psutil.Process]:
        """Ranks with this launcher's word file in their environment, whatever is left between it and them."""
        if self._word_file is None:
            return []
        ranks = filter(_is_rank, psutil.process_iter())
        return [rank for rank in ranks if _variables(rank).get(WORD_FILE) == self._word_file]

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def listeners(tree: Sequence[psutil.Process], signum: int) -> list[psutil.Process]:
    """Processes of a tree that get the signal.

    Where there are ranks, those that catch the signal. Elsewhere every process that catches it or waits for it with the
    signal blocked (srun does), but none below another such process, which is expected to pass it on itself.
    """
    ranks = _topmost([process for process in tree if _is_rank(process)])
    if ranks:
        return [process for process in ranks if _hears(process, signum, "SigCgt")]
    return _topmost([process for process in tree if _hears(process, signum, "SigCgt", "SigBlk")])


def _topmost(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    pids = {process.pid for process in processes}
    return [process for process in processes if not pids & _ancestors(process)]


def _ancestors(process: psutil.Process) -> set[int]:
    try:
        return {parent.pid for parent in process.parents()}
    except psutil.Error:
        return set()


def _is_rank(process: psutil.Process) -> bool:
    return "RANK" in _variables(process)


def _variables(process: psutil.Process) -> dict[str, str]:
    """A process's environment; empty where it has ended or is another user's."""
    try:
        found: dict[str, str] = process.environ()
    except (psutil.Error, OSError):
        return {}
    return found


def _hears(process: psutil.Process, signum: int, *masks: str) -> bool:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # it has ended
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return any(int(fields[mask], 16) >> (signum - 1) & 1 for mask in masks)


def _send(process: psutil.Process, signum: int) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        return


def _ignore_save() -> None:
    """Ignores the signal to save in the child, before the command replaces it."""
    signal.signal(SAVE, signal.SIG_IGN)


class Inbox:
    """Signals sent to the launcher itself while the `with` block runs, in order."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, SAVE)

    def __init__(self) -> None:
        self._arrived: list[int] = []

    def __enter__(self) -> "Inbox":
        self._before = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        self._arrived.append(signum)

    def take(self) -> list[int]:
        """Returns the signals that have arrived since the last call."""
        taken, self._arrived = self._arrived, []
        return taken
