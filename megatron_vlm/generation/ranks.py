"""A model over several devices, asked from one process: the ranks of one replica in child processes, behind a call.

    with load(path, devices=[0, 1]) as assistant:
        assistant.generate([image, "What is this?"])

The children are ranks like any launcher's (rank_server.py) and wait on a pipe each. They are started as programs of
their own, so a script that loads a model needs no `if __name__ == "__main__"`. Every rank gets the same prompts.

The hazards: a child must not outlive this process, so it holds the reading end of a pipe nobody writes to, and ends
when that breaks. And a rank that fails alone leaves the others waiting for it: then all are ended, and what is to be
asked next needs another `load`.
"""

import contextlib
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from megatron_vlm.data.media.images import to_rgb
from megatron_vlm.errors import ConfigError, DataError, MegatronVlmError, ParallelError, one_line
from megatron_vlm.generation.prompts import Dialogue, ImageSource, Message, Prompt, Score, check_message, list_prompts
from megatron_vlm.runtime.failure import is_timeout
from megatron_vlm.runtime.launch import environment_of_child, environment_of_rank, host_store

if TYPE_CHECKING:
    from types import TracebackType

OTHERS_SECONDS = 5.0  # for the other ranks to say the same, once one has failed
END_SECONDS = 10.0


@dataclass(frozen=True)
class Placement:
    """The devices of one replica: GPUs by number, or the CPU so many times as there are ranks."""

    device: Literal["cpu", "cuda"]
    gpus: tuple[int, ...]
    tensor: int
    pipeline: int
    ulysses: int = 1
    ring: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.ulysses * self.ring


def read_devices(
    devices: Sequence[int | str], tensor: int = 1, pipeline: int = 1, ulysses: int = 1, ring: int = 1
) -> Placement:
    """The placement a caller means: tensor ranks over all devices, where no size is given.

    Raises:
        ConfigError: no device, one that is neither "cpu" nor a GPU's number, both kinds, a GPU twice, or sizes that do
            not multiply to the number of devices.
    """
    found = list(devices)
    gpus = tuple(one for one in found if isinstance(one, int) and not isinstance(one, bool) and one >= 0)
    on_cpu = found.count("cpu") == len(found)
    if not found or not (on_cpu or len(gpus) == len(set(gpus)) == len(found)):
        raise ConfigError(
            f"devices: found {found}, needs different GPUs' numbers ([0, 1]) or only 'cpu' (['cpu', 'cpu'])"
        )
    if tensor * pipeline * ulysses * ring == 1:
        tensor = len(found)
    placement = Placement("cpu" if on_cpu else "cuda", gpus, tensor, pipeline, ulysses, ring)
    if placement.world_size != len(found):
        sizes = {"tensor": tensor, "pipeline": pipeline}
        sizes |= {name: size for name, size in (("ulysses", ulysses), ("ring", ring)) if size > 1}
        needed = f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))}"
        raise ConfigError(f"devices: found {len(found)}, needs {needed} of them")
    return placement


@dataclass
class _Children:
    """The ranks' processes, the pipes to them, and the lines whose breaking ends them."""

    processes: list[subprocess.Popen[bytes]]
    connections: list[Connection]
    lifelines: list[int]

    def end(self) -> None:
        """Ends all; a second call does nothing."""
        for connection in self.connections:
            connection.close()  # a rank that waits for a prompt leaves by itself
        for line in self.lifelines:
            os.close(line)  # any other is ended by its watcher
        self.connections, self.lifelines = [], []
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class RankedAssistant:
    """Answers like an `Assistant`, by ranks in child processes.

    Args:
        path: as `load` takes it.
        placement: of the ranks.
        choices: of `load`: template, dtype, format_options, extensions, template_arguments.

    Raises:
        As `load`; ParallelError: a rank ended without a word.
    """

    def __init__(self, path: str | os.PathLike[str], placement: Placement, **choices: Any) -> None:
        self.path = os.fspath(path)
        self._store = host_store()  # where the ranks meet
        self._children = _Children([], [], [])
        self.close = weakref.finalize(self, self._children.end)
        try:
            for rank in range(placement.world_size):
                _start(self._children, rank, placement, self._store.port)
            layout = {name: getattr(placement, name) for name in ("device", "tensor", "pipeline", "ulysses", "ring")}
            self._ask((self.path, {**layout, **choices}, [place for place in sys.path if place]))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RankedAssistant":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self.close()

    def generate(self, prompts: Prompt | Sequence[Prompt], *arguments: Any, **options: Any) -> str | list[str]:
        """Same as `Assistant.generate`.

        Raises:
            As it does; ParallelError: closed, or a rank ended without a word.
        """
        several, are_several = list_prompts(prompts)
        answers: list[str] = self._ask_about(several, "generate", arguments, options)
        return answers if are_several else answers[0]

    def score(
        self, prompts: Prompt | Sequence[Prompt], answers: str | Sequence[str], batch_size: int = 32
    ) -> Score | list[Score]:
        """Same as `Assistant.score`. Raises as it and `generate` here do."""
        several, are_several = list_prompts(prompts)
        scores: list[Score] = self._ask_about(several, "score", (answers if are_several else [answers], batch_size), {})
        return scores if are_several else scores[0]

    def _ask_about(
        self, prompts: Sequence[Prompt], method: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Calls a method of every rank's `Assistant` with the prompts, and returns what it says."""
        ready = [_portable(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
        return self._ask((method, ready, arguments, options))

    def _ask(self, request: tuple[Any, ...]) -> Any:
        """Sends every rank the same -> rank 0's reply. Interrupted, it closes: the replies would be taken for those to
        the next request."""
        if not self.close.alive:
            raise ParallelError(f"the ranks of {self.path} are closed; load it again")
        message = bytes(ForkingPickler.dumps(request))
        try:
            for connection in self._children.connections:
                with contextlib.suppress(BrokenPipeError):  # its end is seen where its reply is awaited
                    connection.send_bytes(message)
            replies = _gather(self._children.connections)
        except BaseException:
            self.close()
            raise
        failures = {rank: reply for rank, reply in replies.items() if isinstance(reply, Exception)}
        if not failures:
            return replies[0]
        mine_to_fix = [failure for _, failure in sorted(failures.items()) if isinstance(failure, MegatronVlmError)]
        if len(mine_to_fix) < len(self._children.connections):
            self.close()  # some rank is gone, or waits for one that has failed
        if mine_to_fix:
            raise mine_to_fix[0]
        silent = [rank for rank in range(len(self._children.processes)) if rank not in replies]
        if silent and all(_waited_in_vain(failure) for failure in failures.values()):
            raise ParallelError(f"rank {silent[0]} of {self.path} has not answered (stopped, or hung)")
        lost = [rank for rank, failure in failures.items() if isinstance(failure, EOFError)]
        if lost:
            code = self._children.processes[lost[0]].returncode
            raise ParallelError(f"rank {lost[0]} of {self.path} ended without a word, exit code {code} (killed?)")
        raise failures[min(failures)]


def _gather(connections: Sequence[Connection]) -> dict[int, Any]:
    """Gathers each rank's reply, EOFError for one that is gone; once one has failed, only of those who reply soon."""
    pending = {connection: rank for rank, connection in enumerate(connections)}
    replies: dict[int, Any] = {}
    deadline: float | None = None
    while pending:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(pending), remaining)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                reply = connection.recv()
            except (EOFError, OSError):
                reply = EOFError()
            replies[pending.pop(connection)] = reply
            if isinstance(reply, Exception) and deadline is None:
                deadline = time.monotonic() + OTHERS_SECONDS
    return replies


def _waited_in_vain(failure: Exception) -> bool:
    """Whether a rank failed because another stayed out of a collective. Its traceback was sent, not the exception."""
    return isinstance(failure, RuntimeError) and is_timeout(str(failure))


def _start(children: _Children, rank: int, placement: Placement, port: int) -> None:
    """One rank's process, in a session of its own: an interrupt from the terminal is this process's to handle."""
    environment = environment_of_rank(rank, placement.world_size, port, environment_of_child())
    if placement.gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_gpu_names(placement.gpus, visible))
    ours, theirs = Pipe()
    their_line, our_line = os.pipe()
    handles = (theirs.fileno(), their_line)
    command = [sys.executable, "-m", "megatron_vlm.generation.rank_server", *map(str, handles)]
    children.connections.append(ours)
    children.lifelines.append(our_line)
    children.processes.append(subprocess.Popen(command, env=environment, pass_fds=handles, start_new_session=True))
    theirs.close()
    os.close(their_line)


def _gpu_names(gpus: Sequence[int], visible: str | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES' names of these GPUs, numbered among those visible here. Raises ConfigError."""
    if visible is None:
        return [str(number) for number in gpus]
    names = [name for name in visible.split(",") if name]
    if max(gpus) >= len(names):
        raise ConfigError(f"devices: found {list(gpus)}, needs numbers below {len(names)}, the GPUs visible here")
    return [names[number] for number in gpus]


def _portable(prompt: Prompt, origin: str) -> Prompt:
    """The prompt as another process can take it. Raises DataError for what is no prompt, or an image in memory that
    cannot be used."""
    if isinstance(prompt, Dialogue):
        rounds = tuple((_portable_message(message, origin), answer) for message, answer in prompt.rounds)
        return Dialogue(rounds, _portable_message(prompt.question, origin))
    return _portable_message(prompt, origin)


def _portable_message(message: Message, origin: str) -> Message:
    parts: list[str | ImageSource] = []
    for part in check_message(message, origin):
        if isinstance(part, Image.Image):
            try:
                parts.append(to_rgb(part))
            except (OSError, ValueError) as error:  # opened lazily, it may be damaged
                raise DataError(f"{origin}: an image in memory cannot be used: {one_line(error)}") from error
        else:
            parts.append(part.absolute() if isinstance(part, Path) else part)
    return parts
