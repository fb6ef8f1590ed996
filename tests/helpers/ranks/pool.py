"""The pool of rank processes that multi-rank tests share (DESIGN 6).

    def body(factor):                       # module-level: it is sent by name
        return factor * dist.get_rank()

    def test_it(ranks):
        assert ranks.run(4, body, 10) == [0, 10, 20, 30]

Ranks are forked from a server that has imported torch and megatron-core already: the import is paid once, by the first
test that asks for ranks, and starting another rank, or all of them again after a failure, costs a fraction of a second.
The pool grows to the largest number asked for. A task gets a default gloo group over the first n ranks, ended
afterwards. A failed task ends the pool, so that no test meets another's remains; so does one whose groups' threads
stay.

No torch here: pytest's own process need not import it.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANK_MODULE = "tests.helpers.ranks.rank_process"
START_SECONDS = 120.0  # the server's imports, on a busy machine
GRACE_SECONDS = 3.0  # for the other ranks, once one has failed
LOG_TAIL_CHARACTERS = 4000
MAX_RANKS = 8
MAX_GROUPS = 12  # that a rank may still hold between tasks; their threads never sleep


class RankFailure(AssertionError):
    """A task failed, died or hung on some rank; the message has every rank's story."""


class _Rank:
    """One process and the pipe to it."""

    def __init__(self, rank: int, port: int | None, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([RANK_MODULE])
        self.pipe, theirs = context.Pipe()
        self.log = log
        self.process = context.Process(target=_serve, args=(rank, port, theirs, str(log)), name=f"rank{rank}")
        self.process.start()
        theirs.close()

    def port_when_ready(self, deadline: float) -> int:
        """Waits for the process to be up. Rank 0's answer is its store's port."""
        if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
            raise RankFailure(f"{self.process.name} did not start in {START_SECONDS:.0f} s\n{self.log_tail()}")
        try:
            return self.pipe.recv()[1]
        except EOFError:
            raise RankFailure(f"{self.process.name} died while starting (see stderr)\n{self.log_tail()}") from None

    def kill(self) -> None:
        """Ends the process and its children."""
        for end in (os.killpg, os.kill):
            try:
                end(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.join()
        self.pipe.close()

    def num_groups(self) -> int:
        """Process groups that live in it, by the threads that gloo gives each."""
        number = 0
        for name in Path(f"/proc/{self.process.pid}/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # it has ended since
                number += name.read_text().startswith("gloo")
        return number

    def log_tail(self) -> str:
        """What it printed last."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-LOG_TAIL_CHARACTERS:].strip()


def _serve(rank: int, port: int | None, pipe: Connection, log: str) -> None:
    """Runs in the new process; imports there what pytest's process does without."""
    from tests.helpers.ranks.rank_process import serve

    serve(rank, port, pipe, log)


class RankPool:
    """Up to 8 rank processes, started when first needed.

    Args:
        directory: for the ranks' logs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ranks: list[_Rank] = []
        self.port: int | None = None
        self.num_tasks = self.num_starts = self.num_started = 0
        self.start_seconds = 0.0  # of all starts, each from its beginning until its ranks could take their first task

    def run(self, num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
        """Calls a module-level `function(*arguments)` on each of `num_ranks` ranks.

        Returns:
            What it returned, by rank. Tensors come back as copies.

        Raises:
            RankFailure: it raised, died or outran `timeout` seconds on some rank; every rank's traceback is told.
        """
        assert 1 <= num_ranks <= MAX_RANKS, f"{num_ranks} ranks"
        work = pickle.dumps((function, arguments))
        self._grow(num_ranks)
        self.num_tasks += 1
        ranks = self.ranks[:num_ranks]
        try:
            for rank in ranks:
                rank.log.write_bytes(b"")
                rank.pipe.send_bytes(pickle.dumps((self.num_tasks, num_ranks, work)))
            answers = self._collect(ranks, time.monotonic() + timeout)
        except BaseException:  # pytest's own timeout, say: this task's answers must not be taken for the next one's
            self.stop()
            raise
        if any(answer is None or answer[0] == "failed" for answer in answers):
            story = self._tell(ranks, answers, timeout)
            self.stop()
            raise RankFailure(story)
        if max(rank.num_groups() for rank in ranks) > MAX_GROUPS:
            self.stop()
        return [answer[1] for answer in answers]

    def stop(self) -> None:
        """Ends all ranks; the next `run` starts new ones."""
        for rank in self.ranks:
            rank.kill()
        self.ranks, self.port = [], None

    def _grow(self, num_ranks: int) -> None:
        if num_ranks <= len(self.ranks):
            return
        begin = time.monotonic()
        deadline = begin + START_SECONDS
        self.num_starts += 1
        self.num_started += num_ranks - len(self.ranks)
        new = []
        while len(self.ranks) < num_ranks:
            rank = _Rank(len(self.ranks), self.port, self.directory / f"rank{len(self.ranks)}.log")
            self.ranks.append(rank)
            if self.port is None:
                self.port = rank.port_when_ready(deadline)
            else:
                new.append(rank)
        for rank in new:
            rank.port_when_ready(deadline)
        self.start_seconds += time.monotonic() - begin

    def _collect(self, ranks: list[_Rank], deadline: float) -> list[Any]:
        """Every rank's ("done", result) or ("failed", traceback); None where it gave no answer in time."""
        answers: list[Any] = [None] * len(ranks)
        waiting = {rank.pipe: number for number, rank in enumerate(ranks)}
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), deadline - time.monotonic()):
                number = waiting.pop(pipe)
                try:
                    answers[number] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ranks[number].process.join(GRACE_SECONDS)
                    answers[number] = ("failed", f"died, exit code {ranks[number].process.exitcode}")
                if answers[number][0] == "failed":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _tell(self, ranks: list[_Rank], answers: list[Any], timeout: float) -> str:
        """The whole story of a failed task. Ranks that hang write their stacks first."""
        silent = [rank for rank, answer in zip(ranks, answers, strict=True) if answer is None]
        for rank in silent:
            os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(0.5 if silent else 0)
        failed = any(answer is not None and answer[0] == "failed" for answer in answers)
        lines = ["a task failed on its ranks" if failed else f"a task hung: no answer in {timeout:.0f} s"]
        for number, (rank, answer) in enumerate(zip(ranks, answers, strict=True)):
            outcome, detail = answer if answer is not None else ("did not answer; its stacks:", "")
            lines.append(f"---- rank {number}: {outcome}" + (f"\n{detail}" if outcome == "failed" else ""))
            if outcome != "done" and rank.log_tail():
                lines.append(f"---- rank {number} printed:\n{rank.log_tail()}")
        return "\n".join(lines)
