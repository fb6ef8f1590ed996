"""Random streams go on where they stopped, and are others for every seed and step."""

import io
import random

import numpy as np
import torch

from megatron_vlm.runtime.seeding import are_of_this_device, random_states, restore_random_states, seed_everything
from tests.helpers.ranks.solo import one_rank


def draw() -> tuple[float, float, list[float], list[float]]:
    """A number from every stream."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    return random.random(), float(np.random.normal()), torch.rand(3).tolist(), inside


def through_a_file(states: dict) -> dict:
    """As a checkpoint keeps them: without anything that would have to be trusted."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_stream_goes_on() -> None:
    with one_rank() as grid:
        seed_everything(7, grid)
        draw()
        states = through_a_file(random_states())
        expected = [draw(), draw()]
        seed_everything(8, grid)
        restore_random_states(states)
        assert [draw(), draw()] == expected


def test_streams_differ_by_seed_and_step_and_by_nothing_else() -> None:
    with one_rank() as grid:
        drawn = []
        for seed, step in ((7, 0), (7, 0), (7, 4), (7, 4), (7, 5), (8, 4)):
            seed_everything(seed, grid, step)
            drawn.append(draw())
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    distinct = [drawn[0], drawn[2], drawn[4], drawn[5]]
    for stream in range(4):
        assert len({str(numbers[stream]) for numbers in distinct}) == 4


def test_states_of_another_kind_of_device_are_told_apart() -> None:
    with one_rank():
        states = through_a_file(random_states())
    assert are_of_this_device(states)
    assert not are_of_this_device({**states, "device": torch.zeros(16, dtype=torch.uint8)})  # CUDA's: seed and offset
