"""Items come in order from any number of workers, and errors come as themselves."""

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_vlm.data.fetch import workers
from megatron_vlm.data.fetch.workers import OrderedItems
from megatron_vlm.errors import DataError
from tests.helpers.data.squares import Squares

SLOW_SECONDS = 0.5
AT_MOST_SECONDS = 30


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_errors(num_workers: int) -> None:
    items = OrderedItems(Squares(bad=13), range(5, 15), num_workers)
    assert len(items) == 10
    stream = iter(items)
    taken = [next(stream) for _ in range(8)]
    assert [number for number, _, _ in taken] == list(range(5, 13))
    assert all(value.tolist() == [number * number] * 2 for number, value, _ in taken)
    assert (os.getpid() in {pid for _, _, pid in taken}) == (num_workers == 0)
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value) == "item 13 is bad"


def test_a_killed_worker_is_told_in_one_line() -> None:
    """As by a machine that is out of memory."""
    with pytest.raises(DataError, match=r"^DataLoader worker .* \(data.num_workers: 2; was the memory") as caught:
        list(OrderedItems(Squares(killed=3), range(9), 2))
    assert "\n" not in str(caught.value)


def test_ending_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last item, in the middle, and after an error. What is not to be waited for takes longer than any
    machine is slow."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 20 * AT_MOST_SECONDS)
    monkeypatch.setattr(workers, "END_SECONDS", 20 * AT_MOST_SECONDS)
    for number, bad in ((4, -1), (1, -1), (4, 3)):
        stream = iter(OrderedItems(Squares(bad=bad), range(5), 2))
        next(stream)
        started = time.monotonic()
        try:
            for _ in range(number):
                next(stream)
        except DataError as error:
            assert error.__traceback__ is not None
        del stream
        gc.collect()
        assert time.monotonic() - started < AT_MOST_SECONDS


@dataclass(frozen=True)
class ManyTensors:
    """Items as large steps are: more tensors than a process may have files open."""

    def produce(self, number: int) -> list[torch.Tensor]:
        return [torch.full((3,), number) for _ in range(400)]


def test_many_tensors_need_no_file_each() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        with time_limit(30):
            items = list(OrderedItems(ManyTensors(), range(3), 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(item[-1][0]) for item in items] == [0, 1, 2]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is up."""

    def over(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


RANK = """
import os, signal, sys
from megatron_vlm.data.fetch.workers import OrderedItems
from tests.helpers.data.squares import Squares

if __name__ == "__main__":
    stream = iter(OrderedItems(Squares(), range(1000), 2))
    print(next(stream)[2], next(stream)[2], flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[1] == "exit":
        os._exit(3)
"""


@pytest.mark.parametrize(
    ("end", "wanted"), [pytest.param("exit", 3, marks=pytest.mark.slow), ("kill", -signal.SIGKILL), ("return", 0)]
)
def test_workers_end_with_their_rank(tmp_path: Path, end: str, wanted: int) -> None:
    """A rank that is killed, ends itself at once as a failing one does, or just comes to its end in the middle of a
    pass leaves no process behind, and waits for none."""
    (tmp_path / "rank.py").write_text(RANK)
    root = Path(__file__).parents[4]
    command, environment = [sys.executable, str(tmp_path / "rank.py"), end], {**os.environ, "PYTHONPATH": str(root)}
    with open(tmp_path / "pids", "w") as output, open(tmp_path / "errors", "w") as errors:  # pipes wait for workers too
        code = subprocess.run(command, env=environment, stdout=output, stderr=errors, timeout=120).returncode
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(set(pids)) == 2 and code == wanted
    assert not {"Exception", "Traceback", "FATAL"} & set((tmp_path / "errors").read_text().split())
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_running(pid: int) -> bool:
    """False for a zombie nobody has waited for, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError, match="in produce"):
        list(OrderedItems(Squares(broken=1), range(3), 1))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("how", ["panicking", "leaving"])
def test_what_would_end_a_worker_without_a_word_is_told(num_workers: int, how: str) -> None:
    kind = {"panicking": r"Panic: called `Option::unwrap\(\)`", "leaving": "SystemExit: 0"}[how]
    stream = iter(OrderedItems(Squares(**{how: 1}), range(3), num_workers))
    assert next(stream)[0] == 0
    with pytest.raises(RuntimeError, match=f"item 1 ended in a {kind}"):
        next(stream)


def test_the_models_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(OrderedItems(Squares(), range(3), 0))
    assert torch.equal(torch.rand(3), expected)


class Slowly:
    """A stand-in for unpickling a large item: takes its time, in whatever thread, and raises where told to."""

    def __init__(self, seconds: float = SLOW_SECONDS, broken: int = -1) -> None:
        self.seconds, self.broken = seconds, broken
        self.threads: list[str] = []  # of the items done

    def __call__(self, item: tuple[int, torch.Tensor, int]) -> tuple[int, torch.Tensor, int]:
        time.sleep(self.seconds)
        self.threads.append(threading.current_thread().name)
        if item[0] == self.broken:
            raise KeyError("a bug in preparing")
        return item

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.threads) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "next item"]


def test_the_next_item_is_made_meanwhile_and_no_more() -> None:
    slowly, waits = Slowly(), []
    stream = iter(OrderedItems(Squares(), range(4), 1, slowly))
    next(stream)
    for number in (1, 2, 3):
        slowly.wait_for(number + 1)  # while the caller works
        started = time.monotonic()
        assert next(stream)[0] == number
        waits.append(time.monotonic() - started)
    assert min(waits) < SLOW_SECONDS / 10  # not all: a busy machine takes its pauses
    assert list(stream) == [] and set(slowly.threads) == {"next item"} and len(slowly.threads) == 4
    assert not reading_threads()
    slowly = Slowly()
    stream = iter(OrderedItems(Squares(), range(4), 1, slowly))
    next(stream)
    slowly.wait_for(2)
    time.sleep(2 * SLOW_SECONDS)
    assert len(slowly.threads) == 2  # of four


@pytest.mark.parametrize("source", ["worker", "prepare"])
def test_an_error_comes_with_its_item(source: str) -> None:
    """Not while the item before is worked on, though it is known by then."""
    slowly = Slowly(0.0, broken=2 if source == "prepare" else -1)
    items = OrderedItems(Squares(bad=2 if source == "worker" else -1), range(9), 1, slowly)
    stream = iter(items)
    assert [next(stream)[0], next(stream)[0]] == [0, 1]
    slowly.wait_for(3 if source == "prepare" else 2)
    time.sleep(0.2)
    with pytest.raises(KeyError if source == "prepare" else DataError, match="bug in preparing|item 2 is bad"):
        next(stream)
    assert not reading_threads() and list(stream) == []
    assert next(iter(items))[0] == 0  # another pass, as if nothing had been


def test_without_workers_nothing_is_made_ahead() -> None:
    slowly = Slowly(0.0)
    stream = iter(OrderedItems(Squares(bad=1), range(3), 0, slowly))
    assert next(stream)[0] == 0 and not slowly.threads and not reading_threads()


@dataclass(frozen=True)
class Jittery:
    """Items that take from nothing to 20 ms, or, after the first, `seconds`."""

    seconds: float | None = None

    def produce(self, number: int) -> tuple[int, torch.Tensor, int]:
        pause = number * 7919 % 21 / 1000 if self.seconds is None else min(number, 1) * self.seconds
        time.sleep(pause)
        return number, torch.full((30_000,), number), os.getpid()


def test_all_come_in_order_whoever_is_late() -> None:
    found = []
    for item in OrderedItems(Jittery(), range(60), 3, Slowly(0.002)):
        found.append(item[0])
        time.sleep(item[0] * 104_729 % 11 / 1000)
    assert found == list(range(60)) and not reading_threads()


def leave(stream: Iterator) -> None:
    stream.close()  # type: ignore[attr-defined]


def be_interrupted(stream: Iterator) -> None:
    """As by Ctrl-C: Python's handler runs at once, in the middle of the wait."""
    started = time.monotonic()

    def interrupt(*_: object) -> None:
        assert time.monotonic() - started < 1
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("end", [leave, be_interrupted])
def test_leaving_early_ends_thread_and_workers(end: Callable[[Iterator], None]) -> None:
    """While the thread waits for an item that takes its time; a worker finishes the one it makes."""
    stream = iter(OrderedItems(Jittery(1.5), range(9), 2))
    pid = next(stream)[2]
    assert reading_threads() and is_running(pid)
    started = time.monotonic()
    end(stream)
    assert not reading_threads() and not is_running(pid)
    assert time.monotonic() - started < 4


@dataclass(frozen=True)
class Large:
    """Items that no pipe holds."""

    def produce(self, number: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1_000_000), os.getpid()


def test_a_worker_killed_while_it_sends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of its item never comes, and no end of the pipe either."""
    monkeypatch.setattr(workers, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    stream = iter(OrderedItems(Large(), range(9), 1))
    pid = next(stream)[1]
    time.sleep(0.5)  # the next item is here, and the one after that in the pipe
    os.kill(pid, signal.SIGKILL)
    with time_limit(20), pytest.raises(DataError, match="^DataLoader worker"):
        list(stream)
