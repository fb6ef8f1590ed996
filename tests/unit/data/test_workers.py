"""Items come in order from any number of workers, and errors come as themselves."""

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_vlm.data.workers import OrderedItems
from megatron_vlm.errors import DataError


@dataclass(frozen=True)
class Squares:
    bad: int = -1
    broken: int = -1
    killed: int = -1

    def produce(self, number: int) -> tuple[int, torch.Tensor, int]:
        if number == self.bad:
            raise DataError(f"item {number} is bad")
        if number == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.broken:
            raise KeyError("a bug")
        return number, torch.full((2,), number * number), os.getpid()


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


def test_ending_does_not_wait() -> None:
    """After the last item, in the middle, and after an error."""
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
        assert time.monotonic() - started < 4


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
from megatron_vlm.data.workers import OrderedItems
from tests.unit.data.test_workers import Squares

if __name__ == "__main__":
    stream = iter(OrderedItems(Squares(), range(1000), 2))
    print(next(stream)[2], next(stream)[2], flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[1] == "exit":
        os._exit(3)
"""


@pytest.mark.parametrize(("end", "wanted"), [("exit", 3), ("kill", -signal.SIGKILL), ("return", 0)])
def test_workers_end_with_their_rank(tmp_path: Path, end: str, wanted: int) -> None:
    """A rank that is killed, ends itself at once as a failing one does, or just comes to its end in the middle of a
    pass leaves no process behind, and waits for none."""
    (tmp_path / "rank.py").write_text(RANK)
    root = Path(__file__).parents[3]
    command, environment = [sys.executable, str(tmp_path / "rank.py"), end], {**os.environ, "PYTHONPATH": str(root)}
    with open(tmp_path / "pids", "w") as output:  # a pipe would wait for the workers too
        code = subprocess.run(command, env=environment, stdout=output, timeout=120).returncode
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(set(workers)) == 2 and code == wanted
    deadline = time.monotonic() + 20
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
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


def test_the_models_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(OrderedItems(Squares(), range(3), 0))
    assert torch.equal(torch.rand(3), expected)
