"""Signals that ask a job to save and end: noted in time, at once before the first step, and not by children."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from unittest import mock

import psutil
import pytest

from megatron_vlm.runtime import signals
from tests.helpers.ranks.processes import ROOT, environment

NOTE_SECONDS = 10.0


def noted(stop: signals.StopSignals) -> int:
    """What is noted within the time."""
    deadline = time.monotonic() + NOTE_SECONDS
    while not stop.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.seen


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in the foreground: tests that a shell starts in the background begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 600.0)  # the second one below is no second Ctrl-C, however late
    before = [signal.getsignal(each) for each in signals.SIGNALS]
    with signals.StopSignals() as stop:
        stop.arm()
        os.kill(os.getpid(), number)
        assert noted(stop) == number
        os.kill(os.getpid(), number)  # a second one changes nothing
    assert [signal.getsignal(each) for each in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert signals.name_of(number) == number.name and signals.name_of(0) is None


def test_a_ctrl_c_that_comes_while_the_first_is_told_is_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher passes the terminal's on; the first line of a console takes a second where the machine is busy."""
    ended: list[int] = []
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.2)
    monkeypatch.setattr(signals.logger, "info", lambda *_: time.sleep(1.0))
    monkeypatch.setattr(os, "_exit", ended.append)
    with signals.StopSignals() as stop:
        stop.arm()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        assert noted(stop) == signal.SIGINT
        time.sleep(0.5)
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)  # the second
        deadline = time.monotonic() + NOTE_SECONDS
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ended == [signals.INTERRUPTED]


def program(body: str) -> subprocess.Popen:
    """Python in a process of its own that says when it is ready."""
    text = f"import os, sys, time, signal, subprocess\nfrom megatron_vlm.runtime.signals import *\n{body}"
    process = subprocess.Popen(
        [sys.executable, "-c", text], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
    return process


def test_before_the_first_step_the_process_ends_at_once_and_well() -> None:
    """Even where the main thread is in C and no Python handler could run: the lock is never let go."""
    waiting = "import threading\nlock = threading.Lock(); lock.acquire()\n"
    blocked = program(waiting + "with StopSignals():\n print('ready', flush=True)\n lock.acquire()\n")
    blocked.send_signal(signal.SIGTERM)
    out, err = blocked.communicate(timeout=30)
    assert (blocked.returncode, err) == (0, "")
    assert "stopped by SIGTERM before the first step: nothing to save" in " ".join(out.split())


def test_ctrl_c_saves_and_a_second_one_ends_at_once() -> None:
    """Two that come together are one: the terminal's, and the launcher's that passes it on."""
    hearing = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = program(
        f"{hearing}with StopSignals() as stop:\n stop.arm()\n print('ready', flush=True)\n"
        " while not stop.seen: time.sleep(0.01)\n print('saving', flush=True)\n time.sleep(60)\n"
    )
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "saving" not in (line := process.stdout.readline()):
        assert line
    time.sleep(signals.REPEAT_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "") and "ending at once" in out


def test_ctrl_c_before_the_first_step_ends_with_its_own_code() -> None:
    hearing = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = program(f"{hearing}with StopSignals():\n print('ready', flush=True)\n time.sleep(60)\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "") and "stopped by SIGINT before the first step" in out


def test_a_background_job_leaves_ctrl_c_to_others() -> None:
    with mock.patch.object(signal, "getsignal", lambda number: signal.SIG_IGN), signals.StopSignals() as stop:
        assert signal.SIGINT not in stop._handlers and signal.SIGTERM in stop._handlers


@pytest.mark.parametrize(
    ("variables", "number", "told"),
    [
        ({}, signal.SIGTERM, ""),
        ({"TORCHELASTIC_RUN_ID": "x"}, signal.SIGTERM, "kills its ranks 30 s later, and what they have not saved is"),
        ({"TORCHELASTIC_RUN_ID": "x"}, signal.SIGUSR1, ""),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, signal.SIGINT, "ranks 90 s later"),
        ({"TORCHELASTIC_RUN_ID": "x", "MEGATRON_VLM_WORD_FILE": "y"}, signal.SIGTERM, ""),
    ],
)
def test_no_save_is_promised_that_torchrun_may_prevent(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], number: int, told: str
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "MEGATRON_VLM_WORD_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = signals._for_how_long(number)
    assert told in found and bool(told) == bool(found)


def test_a_rank_told_to_end_that_loses_its_peers_ends_without_a_word() -> None:
    lost = "raise RuntimeError('[gloo] connection closed by peer')"
    for arm, code in (("stop.arm()", 1), ("", 1)):
        process = program(
            f"with StopSignals() as stop:\n {arm}\n print('ready', flush=True)\n"
            + (" while not stop.seen: time.sleep(0.01)\n" if arm else "")
            + f" {lost}\n"
        )
        if arm:
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert ("connection closed" in err) == (not arm)


def test_children_take_no_notice() -> None:
    sleeper = "[sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)']"
    process = program(
        f"with kept_from_children(with_tracker=True):\n deaf = subprocess.Popen({sleeper}, stdout=subprocess.PIPE)\n"
        f"hearing = subprocess.Popen({sleeper}, stdout=subprocess.PIPE)\n"
        "for child in (deaf, hearing): child.stdout.readline()\n"
        "for number in SIGNALS:\n deaf.send_signal(number)\nhearing.send_signal(signal.SIGUSR1)\n"
        "code = hearing.wait(); time.sleep(0.2)\n"
        "print('ready', flush=True); print(deaf.poll(), code); deaf.kill()\n"
    )
    assert process.stdout is not None
    assert process.stdout.read() == f"None {-signal.SIGUSR1}\n"
    process.communicate(timeout=60)


def sleep_until_the_parent_ends(said: Connection) -> None:
    """In a child."""
    signals.BeginAsChild()()
    said.send(os.getpid())
    time.sleep(60)


def have_a_child(said: Connection) -> None:
    """In a process that is to be killed: its own child by the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.Process(target=sleep_until_the_parent_ends, args=(said,)).start()
    time.sleep(60)


def test_a_child_ends_with_the_process_that_asked_for_it() -> None:
    context = multiprocessing.get_context("forkserver")
    listener, said = context.Pipe(duplex=False)
    parent = context.Process(target=have_a_child, args=(said,))
    parent.start()
    child = listener.recv()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + NOTE_SECONDS
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)
