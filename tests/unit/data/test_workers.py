"""Items come in order from any number of workers, and errors come as themselves."""

import os
from dataclasses import dataclass

import pytest
import torch

from megatron_vlm.data.workers import OrderedItems
from megatron_vlm.errors import DataError


@dataclass(frozen=True)
class Squares:
    bad: int = -1
    broken: int = -1

    def produce(self, number: int) -> tuple[int, torch.Tensor, int]:
        if number == self.bad:
            raise DataError(f"item {number} is bad")
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


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError, match="in produce"):
        list(OrderedItems(Squares(broken=1), range(3), 1))


def test_the_models_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(OrderedItems(Squares(), range(3), 0))
    assert torch.equal(torch.rand(3), expected)
