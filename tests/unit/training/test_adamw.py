"""Our AdamW against torch's, step by step, and its state as megatron-core's checkpoints read it."""

import copy

import torch

from megatron_vlm.training.adamw import AdamW


def train(cls: type, steps: int, **settings: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7, generator=generator))
    idle = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([{"params": [weight]}, {"params": [idle]}, {"params": []}], lr=1e-2, **settings)
    for _ in range(steps):
        weight.grad = torch.randn(5, 7, generator=generator)
        optimizer.step()
    assert torch.equal(idle, torch.ones(3)), "a parameter without a gradient is left alone"
    return weight.detach()


def test_equals_torch() -> None:
    ours = train(AdamW, 20, weight_decay=0.1, betas=(0.9, 0.95))
    theirs = train(torch.optim.AdamW, 20, weight_decay=0.1, betas=(0.9, 0.95))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_differs_where_the_decay_differs() -> None:
    assert not torch.allclose(train(AdamW, 20, weight_decay=0.1), train(torch.optim.AdamW, 20, weight_decay=0.0))


def test_the_step_count_is_in_the_group_and_survives_a_round_trip() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.ones(2)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["step"] == 3
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
    other = torch.nn.Parameter(weight.detach().clone())
    resumed = AdamW([other], lr=0.1)
    resumed.load_state_dict(state)
    weight.grad, other.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    resumed.step()
    assert torch.equal(weight, other)
