"""What never ends is stopped, wherever it computes, and nothing is left behind of the limits."""

import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_vlm.runtime.limits import LimitError, _timer, bounded


def busy() -> None:
    while True:
        pass


def deaf() -> None:
    """Goes on after any exception."""
    while True:
        try:
            busy()
        except Exception:  # noqa: BLE001
            continue


ENDLESS: dict[str, Callable[[], Any]] = {
    "Python": busy,
    "after exceptions": deaf,
    "a regex": lambda: re.search("^(([a-z])+)+!$", "a" * 64),
    "large integers": lambda: 10**10**10,
}


def limits_of_the_process() -> tuple[Any, ...]:
    timer = signal.getitimer(signal.ITIMER_VIRTUAL)
    return resource.getrlimit(resource.RLIMIT_DATA), timer, _timer.depth


@pytest.mark.parametrize("name", ENDLESS)
def test_time(name: str) -> None:
    before, start = limits_of_the_process(), time.process_time()
    with pytest.raises(LimitError, match=r"more than 0\.2 s of processor time"):
        bounded(ENDLESS[name], seconds=0.2)
    assert time.process_time() - start < 10 and limits_of_the_process() == before


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_memory(in_main_thread: bool) -> None:
    before, found = limits_of_the_process(), []

    def fill() -> None:
        try:
            bounded(lambda: "a" * (3 << 30), memory_bytes=1 << 30)
        except LimitError as error:
            found.append(str(error))

    if in_main_thread:
        fill()
    else:
        thread = threading.Thread(target=fill)
        thread.start()
        thread.join()
    assert found == ["it takes more than 1,073,741,824 bytes of memory"] and limits_of_the_process() == before


def test_what_is_within_the_limits_is_left_alone() -> None:
    before = limits_of_the_process()
    assert bounded(lambda: 3) == 3
    with pytest.raises(KeyError):
        bounded(lambda: {}["a"])
    with pytest.raises(LimitError):  # the outer one's time goes on behind the inner one
        bounded(lambda: (bounded(lambda: 3), busy()), seconds=0.2)
    assert limits_of_the_process() == before
