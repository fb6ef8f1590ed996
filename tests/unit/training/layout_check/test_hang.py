"""Work that is watched: its result, its error, and the story of a hang."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import prepare
from megatron_vlm.training.layout_check.hang import PHASE_OF, PHASES, Hang, Place, run_watched

LIMIT_SECONDS = 0.5


def watched(work: Callable[[Callable[[int], None]], Any]) -> Any:
    prepare("cpu")
    return run_watched(work, dist.HashStore(), rank=0, num_ranks=1, limit_seconds=LIMIT_SECONDS)


def test_the_result_is_returned() -> None:
    def work(give_sign: Callable[[int], None]) -> str:
        for step in range(4):  # longer than the limit in all, but never without a sign
            threading.Event().wait(LIMIT_SECONDS / 2)
            give_sign(step)
        return "done"

    assert watched(work) == "done"


def test_an_error_is_raised_as_it_is() -> None:
    def work(give_sign: Callable[[int], None]) -> str:
        raise KeyError("a broken invariant")

    with pytest.raises(KeyError, match="a broken invariant"):
        watched(work)


def test_a_hang_is_told_with_its_phase_and_function() -> None:
    end = threading.Event()

    class Waiting:
        @property
        def replica(self) -> None:
            end.wait()

    def work(give_sign: Callable[[int], None]) -> None:
        give_sign(2)
        VisionLanguageModel.exchange(SimpleNamespace(grid=Waiting()), None, SimpleNamespace(over_world=False))  # type: ignore[arg-type]

    hang = watched(work)
    end.set()
    assert isinstance(hang, Hang)
    assert (hang.first.phase, hang.first.steps) == ("exchange", 2)
    assert "Waiting.replica, test_hang.py:" in str(hang)


def test_the_least_far_rank_names_the_phase() -> None:
    places = (
        Place(0, 1, "optimizer", "f, a.py:1"),
        Place(1, 1, "exchange", "g, b.py:2"),
        Place(2, 1, "between phases", "h, c.py:3"),
        Place(3, 1, "exchange", "g, b.py:2"),
    )
    assert str(Hang(places)) == (
        "step 2 hangs in exchange: ranks 1, 3 there (g, b.py:2); rank 0 is in optimizer (f, a.py:1); "
        "rank 2 is in between phases (h, c.py:3)"
    )


def test_every_phase_has_code_of_its_own() -> None:
    """A decorator in common would make one function of several."""
    assert len(PHASE_OF) == len(PHASES)
