"""Ranks that say nothing are named: gone, stopped or hung, and where they stood."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.runtime.failure import is_timeout
from megatron_vlm.runtime.position import HERE, Place, Position, Record, read_record
from megatron_vlm.runtime.roll_call import (
    Publisher,
    Sign,
    all_are_stopped_or_gone,
    end_silent,
    main_thread_frame,
    tell_of,
)
from tests.helpers.ranks.processes import ROOT, environment

IN_VAIN = "error: rank 0 has waited in vain for another rank (stopped, or hung?): Timed out waiting 30000ms"
CLOSED = "error: rank 0 lost another rank, which ended without a word (killed?): Connection closed by peer"
RANK = """
import time
from megatron_vlm.runtime.position import HERE
from megatron_vlm.runtime.roll_call import Sign
HERE.step(12)
HERE.phase("encode")
HERE.sample("cat\\x1b-7")
print(Sign.of_this_process(), flush=True)
HERE.phase("data")  # after its last sign
print("ready", flush=True)
time.sleep(600)
"""


class OtherRank:
    """Another process with a sign in the store, which never answers."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.sign = self.process.stdout.readline().strip()
        assert self.process.stdout.readline() == "ready\n"
        store.set(f"sign/{rank}", self.sign)

    def become(self, number: signal.Signals, state: str) -> None:
        """Is sent a signal, and waited for."""
        self.process.send_signal(number)
        deadline = time.monotonic() + 10
        while Sign.read(self.sign.encode()).state != state and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def other(store: dist.Store) -> Iterator[OtherRank]:
    made = OtherRank(store, 1)
    yield made
    made.process.kill()
    made.process.wait()


def test_a_stopped_rank_is_named_where_it_stands_and_ended(store: dist.Store, other: OtherRank) -> None:
    other.become(signal.SIGSTOP, "T")
    assert all_are_stopped_or_gone(store, [1])
    told = tell_of(store, [1], IN_VAIN, in_vain=True)
    assert re.fullmatch(r"error: rank 1 has not answered for \d+ s \(stopped\) in step 12, phase data", told)
    end_silent(store, [1])
    assert other.process.wait(10) == -signal.SIGKILL  # it would stay for ever


def test_a_rank_that_runs_and_does_not_answer_may_be_either(store: dist.Store, other: OtherRank) -> None:
    assert not all_are_stopped_or_gone(store, [1])
    assert "(stopped, or hung) in step 12, phase data" in tell_of(store, [1], IN_VAIN, in_vain=True)


def test_a_killed_rank_is_told_as_killed(store: dist.Store, other: OtherRank) -> None:
    other.become(signal.SIGKILL, "Z")
    assert all_are_stopped_or_gone(store, [1])
    told = tell_of(store, [1], CLOSED, in_vain=False)
    assert told == rf"{CLOSED}; rank 1 is gone in step 12, phase encode, sample 'cat\\x1b-7'"


def test_a_rank_on_another_machine(store: dist.Store) -> None:
    store.set("sign/1", str(Sign("elsewhere", os.getpid(), HERE.record.handle, Place(3, "update", None, time.time()))))
    assert not all_are_stopped_or_gone(store, [1])
    told = tell_of(store, [1], IN_VAIN, in_vain=True)
    assert told.endswith("(stopped or hung, or its machine is gone) in step 3, phase update")


def hang(store: dist.Store, rank: int, frame: str, waits: bool = False) -> None:
    sign = Sign("elsewhere", 1, 1, Place(5, "data", "dog", time.time() - 40), frame, waits)
    for key in ("sign", "answer"):
        store.set(f"{key}/{rank}", str(sign))


def test_a_rank_that_answers_hangs_and_those_that_only_wait_are_not_named(store: dist.Store) -> None:
    hang(store, 1, "decode, files.py:88")
    hang(store, 2, "all_reduce, collectives.py:20", waits=True)
    told = tell_of(store, [1, 2], IN_VAIN, in_vain=True)
    assert told == (
        "error: rank 1 has not gone on for 40 s (hung) in step 5, phase data, sample 'dog', at decode, files.py:88"
    )
    assert "rank 2" in tell_of(store, [2], IN_VAIN, in_vain=True)


def test_what_is_said_where_little_is_known(store: dist.Store) -> None:
    assert tell_of(store, [], IN_VAIN, in_vain=True) == IN_VAIN
    assert tell_of(store, [3], IN_VAIN, in_vain=True) == "error: rank 3 has never given a sign of life"
    assert tell_of(store, [3], CLOSED, in_vain=False) == f"{CLOSED}; rank 3 is gone"
    for rank in range(10, 20):
        hang(store, rank, "")
    assert tell_of(store, range(10, 20), IN_VAIN, in_vain=True).endswith("; and 6 more")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[gloo] Timed out waiting 30000ms for recv operation to complete", True),
        ("wait timeout after 30000ms, keys: /default_pg", True),
        ("NCCL watchdog: collective operation timeout", True),
        ("Connection closed by peer [127.0.0.1]:13838", False),
    ],
)
def test_what_is_a_timeout(message: str, expected: bool) -> None:
    assert is_timeout(message) == expected


class CountedStore:
    """As much of a store as a publisher needs."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.num_sets = 0

    def set(self, key: str, value: str) -> None:
        self.values[key] = value
        self.num_sets += 1


def test_signs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, then only where the rank has moved on, and never twice within the time."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    counted = CountedStore()
    publisher = Publisher(counted, 4)  # type: ignore[arg-type]
    for _ in range(10):
        HERE.step(1)
        publisher.poll()
    assert counted.num_sets == 1
    now = 10.0
    HERE.step(2)
    publisher.poll()
    now = 20.0
    publisher.poll()
    assert counted.num_sets == 2 and Sign.read(counted.values["sign/4"].encode()).place.step == 2


def test_where_the_main_thread_is() -> None:
    found: list[tuple[str, bool]] = []
    held = threading.Lock()
    held.acquire()
    thread = threading.Thread(target=lambda: (found.append(main_thread_frame()), held.release()))
    thread.start()
    held.acquire()
    thread.join()
    ((frame, waits),) = found
    assert frame.startswith("test_where_the_main_thread_is, test_roll_call.py:") and not waits


def test_a_record_is_read_by_others_and_cut_where_it_is_long() -> None:
    position = Position()
    position.sample("x" * 1000)
    position.phase("a phase")
    position.sample("\ud800é" * 300)
    found = read_record(os.getpid(), position.record.handle)
    assert found is not None and found.phase == "a phase" and found.step is None
    assert found.sample is not None and found.sample.startswith("?é?é") and len(found.sample) < 200
    with open(__file__) as no_record:
        assert read_record(os.getpid(), no_record.fileno()) is None
    assert read_record(2**22 + 1, 3) is None


def test_a_worker_writes_into_its_ranks_record() -> None:
    record, worker = Record(), Position()
    worker.write_to(record)
    worker.sample("far")
    assert record.read().sample == "far"
    worker.sample(None)
    assert record.read().sample is None


def test_a_record_costs_next_to_nothing() -> None:
    """Far less than the smallest step of a job here, some milliseconds."""
    position = Position()
    position.record  # noqa: B018 (from now on it is written)
    started = time.process_time()
    for number in range(10_000):
        position.sample(str(number))
    assert (time.process_time() - started) / 10_000 < 100e-6
