"""The head's loss cut over tensor ranks, with every rule: losses and gradients equal the fp64 twin to 1e-6.

The head runs as in the model, with and without sequence parallelism. The vocabulary is small on purpose: at four ranks
the last holds nothing but padding rows, and the soft targets lie across every shard's border.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.ranks.pool import RankPool
from tests.kernels.accuracy import error

S, B, H, V = 12, 2, 16, 9
FIRST, COUNT, STD = 2, 6, 1.2  # of the soft targets: over the borders 3 and 6 at four ranks, 5 at two
CHUNK_TOKENS = 5
EXACT = 1e-6
IN_BLOCKS = "in blocks, as on a GPU"
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "z_loss": {"z_loss": 0.02},
    "label_smoothing": {"label_smoothing": 0.15},
    "softcap": {"softcap": 4.0},
    "soft_targets": {"soft_targets": True},
}
RULES["all"] = {key: value for rules in RULES.values() for key, value in rules.items()}
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2 sp": (2, True), "tp4": (4, False), "tp4 sp": (4, True)}


def inputs(ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [s, b, h], the true rows of the weight [V, h], labels [b, s]: some soft, some not trained."""
    generator = torch.Generator().manual_seed(4)
    hidden = 2 * torch.randn(S, B, H, generator=generator)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) < ignored] = -100
    return hidden, torch.randn(V, H, generator=generator), labels


def with_soft_targets(rules: dict[str, Any]) -> dict[str, Any]:
    from megatron_vlm.ops.reference import SoftTargets

    return {**rules, "soft_targets": SoftTargets(FIRST, COUNT, STD)} if "soft_targets" in rules else dict(rules)


def factors() -> Tensor:
    """By which the tokens' losses are summed [b, s]."""
    return torch.linspace(0.5, 2.0, B * S).view(B, S)


def exact(rules: dict[str, Any], ignored: float = 0.2) -> dict[str, Tensor]:
    """Losses and gradients of the twin in fp64."""
    from megatron_vlm.ops import reference

    hidden, weight, labels = inputs(ignored)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = reference.linear_cross_entropy(
        hidden.flatten(0, 1), weight, labels.T.flatten(), vocab_size=V, **with_soft_targets(rules)
    )
    loss = loss.view(S, B).T
    gradients = torch.autograd.grad((loss * factors()).sum(), (hidden, weight))
    return {"loss": loss.detach(), "hidden": gradients[0], "weight": gradients[1]}


def build_heads(sequence: bool) -> Callable[[float | None, bool], Any]:
    """Arranges the ranks. Returns what makes this rank's head of a soft-cap, which owns its weight or is `tied`."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from transformers import AutoConfig

    from megatron_vlm.config.megatron import transformer_config
    from megatron_vlm.models.head import LanguageHead
    from megatron_vlm.models.language import padded_vocabulary
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.seeding import seed_everything
    from tests.helpers.ranks.solo import LLAMA, small_recipe

    tensor = dist.get_world_size()
    recipe = small_recipe({"hidden_size": H}, None, tensor=tensor, sequence=sequence)
    grid = build_grid(GridSizes.from_config(recipe.parallel, tensor))
    seed_everything(0, grid)
    config = transformer_config(recipe, AutoConfig.for_model(**{**LLAMA, "hidden_size": H}))

    def build(softcap: float | None, tied: bool) -> Any:
        linear = ColumnParallelLinear(
            H,
            padded_vocabulary(V, tensor),
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=tied,
        )
        return LanguageHead(linear, V, CHUNK_TOKENS, softcap)

    return build


def run_head(names: list[str], sequence: bool, tied: bool, fault: str | None, ignored: float) -> dict[str, Any]:
    """By rule: losses [b, s], and the gradients of this rank's hidden [s or s/tp, b, h] and weight [v/tp, h], and the
    collectives of each loss and its backward; runs in the rank."""
    from megatron_vlm.models.language import padded_vocabulary

    tensor, rank = dist.get_world_size(), dist.get_rank()
    hidden, whole, labels = inputs(ignored)
    num_rows = padded_vocabulary(V, tensor) // tensor
    padded = torch.cat([whole, torch.full((num_rows * tensor - V, H), 3.0)])  # padding that would count
    found, build = {}, build_heads(sequence)
    for name in names:
        rules = with_soft_targets(RULES[name])
        head = build(rules.pop("softcap", None), tied).train()
        head.training_rules = rules
        rows = torch.nn.Parameter(padded.split(num_rows)[rank].clone())
        if not tied:
            head.weight.data.copy_(rows.data)
        leaf = (hidden.split(S // tensor)[rank] if sequence else hidden).clone().requires_grad_()
        with planted(fault, tensor), recorded() as collectives:
            loss = head(leaf, labels, rows if tied else None)
            forward = list(collectives)
        (loss * factors()).sum().backward()
        gradient = rows.grad if tied else head.weight.grad
        found[name] = loss.detach(), leaf.grad, gradient, forward
    return found


def run_main_grad(sequence: bool, tied: bool, fault: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """main_grad and what autograd gives besides, each [v/tp, h], of this rank's weight after two micro-batches: the
    first row of the batch, then the second, with every rule; and the hidden states' gradient [s or s/tp, b, h]; runs in
    the rank."""
    from megatron_vlm.models.language import padded_vocabulary

    tensor, rank = dist.get_world_size(), dist.get_rank()
    hidden, whole, labels = inputs()
    num_rows = padded_vocabulary(V, tensor) // tensor
    padded = torch.cat([whole, torch.full((num_rows * tensor - V, H), 3.0)])
    rules = with_soft_targets(RULES["all"])
    head = build_heads(sequence)(rules.pop("softcap"), tied).train()
    head.training_rules = rules
    weight = torch.nn.Parameter(torch.empty(num_rows, H)) if tied else head.weight
    weight.data.copy_(padded.split(num_rows)[rank])
    weight.main_grad = torch.zeros_like(weight)
    by_hidden = []
    for row in range(B):
        of_row = hidden[:, row : row + 1]  # [s, 1, h]
        leaf = (of_row.split(S // tensor)[rank] if sequence else of_row).clone().requires_grad_()
        with planted(fault, tensor):
            loss = head(leaf, labels[row : row + 1], weight if tied else None)
            (loss * factors()[row : row + 1]).sum().backward()
        assert weight.grad_added_to_main_grad
        by_hidden.append(leaf.grad)
    return weight.main_grad, weight.grad, torch.cat(by_hidden, 1)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The all-reduces begun inside: operation and shape."""
    found: list[tuple[str, tuple[int, ...]]] = []
    original = dist.all_reduce

    def recording(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *arguments: Any, **keywords: Any) -> Any:
        found.append((str(op).rpartition(".")[2], tuple(tensor.shape)))
        return original(tensor, op, *arguments, **keywords)

    with mock.patch.object(dist, "all_reduce", recording):
        yield found


@contextlib.contextmanager
def planted(fault: str | None, tensor: int) -> Iterator[None]:
    """Breaks the loss on this rank inside, or lets it run as on a GPU. What its forward computes then is used by its
    backward, which comes to main_grad only."""
    from megatron_vlm.ops import cross_entropy

    targets, shard = cross_entropy._Targets, cross_entropy._Shard
    create, weights, combine = targets.__init__, targets.band_weights, shard.combine

    def over_padding(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        self.uniform *= V / (-(-V // tensor) * tensor)

    def normalised_here(self: Any, piece: slice) -> Tensor:
        own = weights(self, piece)
        return own / own.sum(1, keepdim=True).clamp_min(1e-9) * (own.sum(1, keepdim=True) > 0)

    def of_this_shard(self: Any, lse: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, _, share = combine(self, lse, *others)
        return loss, lse, share

    wrong = {
        None: contextlib.nullcontext(),
        "smoothing over padding": mock.patch.object(targets, "__init__", over_padding),
        "soft targets of a shard": mock.patch.object(targets, "band_weights", normalised_here),
        "log-sum-exp of a shard": mock.patch.object(shard, "combine", of_this_shard),
        "masses forgotten": mock.patch.object(targets, "mass", lambda self: self.weights),
        "main_grad overwritten": mock.patch.object(
            cross_entropy, "_main_grad", lambda weight, _: weight.main_grad.zero_()
        ),
        IN_BLOCKS: mock.patch.multiple(
            cross_entropy, _on_cpu=lambda like: False, BACKWARD_TOKENS=7, BACKWARD_BYTES=4 * 7 * 2
        ),
    }
    with wrong[fault]:
        yield


def differences(
    ranks: RankPool,
    layout: str,
    names: list[str],
    tied: bool = False,
    fault: str | None = None,
    ignored: float = 0.2,
) -> tuple[dict[str, dict[str, float]], list[tuple[str, tuple[int, ...]]]]:
    """Relative L2 errors by rule and tensor, and the collectives of one rank's last forward."""
    tensor, sequence = LAYOUTS[layout]
    outcomes = ranks.run(tensor, run_head, names, sequence, tied, fault, ignored)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        wanted = exact(RULES[name], ignored)
        losses, hidden, weight, collectives = zip(*(outcome[name] for outcome in outcomes), strict=True)
        whole = torch.cat(weight)
        assert not whole[V:].any()
        gradient = [torch.cat(hidden)] if sequence else hidden
        found[name] = {
            "loss": max(error(loss, wanted["loss"]) for loss in losses),
            "hidden": max(error(copy, wanted["hidden"]) for copy in gradient),
            "weight": error(whole[:V], wanted["weight"]),
        }
        assert fault or all(torch.equal(loss, losses[0]) for loss in losses)
    return found, collectives[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_equals_the_twin_in_every_layout(ranks: RankPool, layout: str) -> None:
    found, _ = differences(ranks, layout, list(RULES))
    assert max(value for of_rule in found.values() for value in of_rule.values()) < EXACT, found


@pytest.mark.parametrize("layout", ["tp2 sp", "tp4"])
def test_a_tied_weight_too(ranks: RankPool, layout: str) -> None:
    found, _ = differences(ranks, layout, ["plain", "all"], tied=True)
    assert max(value for of_rule in found.values() for value in of_rule.values()) < EXACT, found


def main_grad_error(ranks: RankPool, layout: str, tied: bool, fault: str | None = None) -> float:
    """Against the twin's gradients of both micro-batches in fp64, the larger of the weight's and the hidden states';
    nothing comes by autograd."""
    tensor, sequence = LAYOUTS[layout]
    outcomes = ranks.run(tensor, run_main_grad, sequence, tied, fault)
    whole = torch.cat([main_grad for main_grad, _, _ in outcomes])
    assert not whole[V:].any() and not any(by_autograd.any() for _, by_autograd, _ in outcomes)
    wanted, shares = exact(RULES["all"]), [by_hidden for _, _, by_hidden in outcomes]
    of_hidden = [torch.cat(shares)] if sequence else shares
    return max(error(whole[:V], wanted["weight"]), *(error(found, wanted["hidden"]) for found in of_hidden))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_grad_is_the_sum_over_micro_batches(ranks: RankPool, layout: str, tied: bool) -> None:
    assert main_grad_error(ranks, layout, tied) < EXACT


@pytest.mark.parametrize("layout", ["tp2 sp", "tp4"])
def test_main_grad_in_blocks_too(ranks: RankPool, layout: str) -> None:
    assert main_grad_error(ranks, layout, False, IN_BLOCKS) < EXACT


@pytest.mark.parametrize("layout", ["tp2", "tp2 sp"])
def test_a_main_grad_that_is_overwritten_is_seen(ranks: RankPool, layout: str) -> None:
    assert main_grad_error(ranks, layout, False, "main_grad overwritten") > 0.1


@pytest.mark.parametrize("name", ["plain", "all"])
def test_one_max_and_one_sum_for_all_pieces(ranks: RankPool, name: str) -> None:
    num_trained = int((inputs()[2] != -100).sum())
    assert num_trained > 3 * CHUNK_TOKENS
    assert differences(ranks, "tp2", [name])[1] == [("MAX", (num_trained,)), ("SUM", (2, num_trained))]
    assert differences(ranks, "tp1", [name])[1] == []


@pytest.mark.parametrize("layout", ["tp2 sp", "tp4"])
def test_all_labels_ignored(ranks: RankPool, layout: str) -> None:
    tensor, sequence = LAYOUTS[layout]
    for outcome in ranks.run(tensor, run_head, ["all"], sequence, False, None, 2.0):
        loss, hidden, weight, _ = outcome["all"]
        assert not loss.any() and not hidden.any() and not weight.any()


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("smoothing over padding", {"label_smoothing": "loss", "all": "loss"}),
        ("soft targets of a shard", {"soft_targets": "loss", "all": "loss"}),
        ("log-sum-exp of a shard", {"z_loss": "weight", "softcap": "hidden", "all": "hidden"}),
        ("masses forgotten", {"label_smoothing": "loss", "soft_targets": "loss"}),
    ],
)
def test_a_fault_is_seen(ranks: RankPool, fault: str, where: dict[str, str]) -> None:
    found, _ = differences(ranks, "tp4", list(where), fault=fault)
    assert all(found[name][tensor] > 100 * EXACT for name, tensor in where.items()), found
