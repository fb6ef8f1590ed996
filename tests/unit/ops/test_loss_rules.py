"""What linear cross entropy can beyond the plain loss: each rule alone and all together against the fp64 twin, on one
rank; the twin against torch's own loss; more ranks in tests/distributed/test_loss.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.ops import cross_entropy, reference
from megatron_vlm.ops.cross_entropy import linear_cross_entropy
from megatron_vlm.ops.reference import SoftTargets
from tests.kernels.accuracy import error

T, H, V, PADDED = 23, 8, 50, 54
SOFT = SoftTargets(first=37, count=9, std=1.3)
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "z_loss": {"z_loss": 0.02},
    "label_smoothing": {"label_smoothing": 0.15},
    "softcap": {"softcap": 4.0},
    "soft_targets": {"soft_targets": SOFT},
}
RULES["all"] = {key: value for rules in RULES.values() for key, value in rules.items()}
EXACT = 1e-6


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, padded weight and labels, of which some are soft and some are not trained."""
    generator = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(T, H, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[2::4] = torch.arange(SOFT.first, SOFT.first + SOFT.count)[: len(labels[2::4])]
    labels[::5] = -100
    return hidden, weight, labels


def with_gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The losses and the gradients of a weighted sum of them."""
    total = (loss * torch.linspace(0.5, 2.0, T, dtype=loss.dtype)).sum()
    gradients = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    return {"loss": loss.detach(), "hidden": gradients[0], "weight": gradients[1]}


def ours(rules: dict[str, Any], chunk_tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the operation gives."""
    hidden, weight, labels = case(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=chunk_tokens, **rules)
    return with_gradients(loss, hidden, weight)


def exact(rules: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the twin gives in fp64 on the values that `dtype` has."""
    hidden, weight, labels = case(dtype)
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return with_gradients(reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V, **rules), hidden, weight)


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 errors by name."""
    return {name: error(found[name], wanted[name]) for name in wanted}


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("name", RULES)
def test_each_rule_equals_the_twin(name: str, chunk_tokens: int) -> None:
    found = ours(RULES[name], chunk_tokens)
    assert max(errors(found, exact(RULES[name])).values()) < EXACT
    assert found["loss"].dtype == torch.float32
    assert not found["loss"][::5].any() and not found["hidden"][::5].any() and not found["weight"][V:].any()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass in blocks: 7 tokens with 6 rows of the weight at a time."""
    monkeypatch.setattr(cross_entropy, "_on_cpu", lambda like: False)
    monkeypatch.setattr(cross_entropy, "BACKWARD_TOKENS", 7)
    monkeypatch.setattr(cross_entropy, "BACKWARD_BYTES", 4 * 7 * 6)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_equals_the_twin_in_blocks(name: str, as_on_a_gpu: None) -> None:
    found = ours(RULES[name])
    assert max(errors(found, exact(RULES[name])).values()) < EXACT
    assert not found["hidden"][::5].any() and not found["weight"][V:].any()


@pytest.mark.parametrize("wrong", ["_slope", "blocks"])
def test_a_wrong_block_is_found(wrong: str, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No slope of the soft-cap; every block's targets those of the first rows."""
    if wrong == "_slope":
        monkeypatch.setattr(cross_entropy, "_slope", lambda logs, lse, softcap: torch.ones_like(logs))
    else:
        cut = cross_entropy._Shard.blocks

        def first(*arguments: Any) -> Any:
            return ((rows, replace(block, first=0)) for rows, block in cut(*arguments))

        monkeypatch.setattr(cross_entropy._Shard, "blocks", first)
    found = errors(ours(RULES["all"]), exact(RULES["all"]))
    assert found["loss"] < EXACT and min(found["hidden"], found["weight"]) > 1e-2


@pytest.mark.parametrize("in_blocks", [False, True])
def test_confident_tokens_are_as_exact_as_by_torch(in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a probability over 0.998 is rounded to 1, so the target must be taken from it before that. The wrong
    variant does so after."""
    monkeypatch.setattr(cross_entropy, "_on_cpu", lambda like: not in_blocks)
    generator = torch.Generator().manual_seed(1)
    weight = functional.normalize(torch.randn(300, 256, generator=generator), dim=-1)
    labels = torch.randint(0, 300, (90,), generator=generator)
    hidden = (torch.randn(90, 256, generator=generator) + 14 * weight[labels]).bfloat16().requires_grad_()
    weight = weight.bfloat16().requires_grad_()
    names = ("hidden", "weight")

    def found() -> dict[str, float]:
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=300, group=None, chunk_tokens=20)
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        return {name: error(ours, exact) for name, ours, exact in zip(names, gradients, wide, strict=True)}

    as_fp64 = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wide = torch.autograd.grad(functional.cross_entropy(as_fp64[0] @ as_fp64[1].T, labels, reduction="sum"), as_fp64)
    loss = functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    assert float(loss.detach()) / len(labels) < 2e-3
    plain = torch.autograd.grad(loss, (hidden, weight))
    limits = {name: 2 * error(x, y) for name, x, y in zip(names, plain, wide, strict=True)}
    assert all(value <= limits[name] for name, value in found().items()), (found(), limits)
    right = cross_entropy._less_targets_
    monkeypatch.setattr(cross_entropy, "_less_targets_", lambda of_all, *rest: right(of_all.bfloat16(), *rest))
    assert all(value > limits[name] for name, value in found().items()), (found(), limits)


@pytest.mark.parametrize("name", list(RULES)[1:])
def test_each_rule_changes_the_loss_and_both_gradients(name: str) -> None:
    """Else the comparison above would prove nothing."""
    assert min(errors(exact(RULES[name]), exact({})).values()) > 1e-3


def test_the_twin_is_torchs_loss_of_the_whole_distribution() -> None:
    hidden, weight, labels = (x.detach().double() if x.is_floating_point() else x for x in case())
    trained = labels != -100
    logits = 4.0 * torch.tanh(hidden[trained] @ weight[:V].T / 4.0)
    target = functional.one_hot(labels[trained], V).double()
    for row, label in enumerate(labels[trained].tolist()):
        if label in range(SOFT.first, SOFT.first + SOFT.count):
            weights = torch.exp(-0.5 * ((torch.arange(V).double() - label) / SOFT.std) ** 2)
            weights[: SOFT.first], weights[SOFT.first + SOFT.count :] = 0.0, 0.0
            target[row] = weights / weights.sum()
    wanted = functional.cross_entropy(logits, target, label_smoothing=0.15, reduction="none")
    wanted = wanted + 0.02 * logits.exp().sum(-1).log() ** 2
    found = reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V, **RULES["all"])
    torch.testing.assert_close(found[trained], wanted)
    assert not found[~trained].any()


def test_fp64_passes_gradcheck() -> None:
    hidden, weight, _ = case(torch.float64)
    labels = torch.tensor([5, 3, 0, 4])
    hidden, weight = hidden.detach()[:4, :3].clone().requires_grad_(), weight.detach()[:8, :3].clone().requires_grad_()
    rules = {**RULES["all"], "soft_targets": SoftTargets(3, 3, std=0.8)}
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, vocab_size=7, group=None, chunk_tokens=2, **rules),
        (hidden, weight),
    )


def test_kept_and_recomputed_pieces_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_PIECE_BYTES", 4 * V * 4)
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=9, **RULES["all"])
    wanted = exact(RULES["all"])
    for _ in range(2):  # the first backward uses up what was kept
        assert max(errors(with_gradients(loss, hidden, weight), wanted).values()) < EXACT


@pytest.mark.parametrize("name", RULES)
def test_bf16_is_within_its_own_rounding(name: str) -> None:
    found = ours(RULES[name], dtype=torch.bfloat16)
    assert found["loss"].dtype == torch.float32 and found["weight"].dtype == torch.bfloat16
    assert max(errors(found, exact(RULES[name], torch.bfloat16)).values()) < 0.01


def _smooth_over_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    create = cross_entropy._Targets.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        self.uniform *= V / PADDED

    monkeypatch.setattr(cross_entropy._Targets, "__init__", wrong)


def _soft_targets_of_other_labels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy._Targets, "_is_soft", staticmethod(lambda labels, soft: labels >= 0))


def _no_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_slope", lambda logs, lse, softcap: torch.ones_like(logs))


def _z_loss_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cross_entropy,
        "_of_all_rows",
        lambda logs, slope, lse, rules, uniform: (logs.exp() - uniform) * (1.0 if slope is None else slope),
    )


@pytest.mark.parametrize(
    ("name", "plant", "where"),
    [
        ("label_smoothing", _smooth_over_padding, "loss"),
        ("soft_targets", _soft_targets_of_other_labels_too, "loss"),
        ("softcap", _no_slope, "hidden"),
        ("z_loss", _z_loss_without_gradient, "weight"),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_fault_in_a_rule_is_seen(
    name: str, plant: Any, where: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    rules = RULES["all" if together else name]
    assert errors(ours(rules), exact(rules))[where] > 100 * EXACT


def test_nothing_trained() -> None:
    hidden, weight, labels = case()
    labels = torch.full_like(labels, -100)
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, **RULES["all"])
    assert not any(tensor.any() for tensor in with_gradients(loss, hidden, weight).values())


def test_a_label_outside_the_vocabulary_is_loud() -> None:
    hidden, weight, labels = case()
    for wrong in (V, PADDED, -1):
        labels[1] = wrong
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, **RULES["all"])
        assert loss[1].isnan() and not loss[2:].isnan().any()


def test_soft_targets_outside_the_vocabulary_are_refused() -> None:
    hidden, weight, labels = case()
    with pytest.raises(AssertionError, match="vocabulary 50"):
        linear_cross_entropy(
            hidden, weight, labels, vocab_size=V, group=None, soft_targets=SoftTargets(V - 3, 4, std=1.0)
        )


def test_a_narrow_distribution_is_the_plain_loss() -> None:
    narrow = ours({"soft_targets": SoftTargets(SOFT.first, SOFT.count, std=1e-3)})
    assert max(errors(narrow, exact({})).values()) < EXACT


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", RULES)
def test_logits_are_never_whole(name: str) -> None:
    hidden, weight, labels = case()
    with Largest() as ours_largest:
        linear_cross_entropy(
            hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=2, **RULES[name]
        ).sum().backward()
    assert ours_largest.num_elements == PADDED * H < T * V  # the weight's gradient
    with Largest() as twins:
        reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V, **RULES[name]).sum().backward()
    assert twins.num_elements >= T * V


# --- into main_grad ---------------------------------------------------------------------------------------------------


def accumulated(num_micro_batches: int, buffer: torch.dtype | None, rules: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(main_grad, .grad) of a bf16 weight after equal micro-batches; without a buffer both are the ordinary one."""
    hidden, weight, labels = case(torch.bfloat16)
    if buffer is not None:
        weight.main_grad = torch.zeros_like(weight, dtype=buffer)  # type: ignore[attr-defined]
    for _ in range(num_micro_batches):
        loss = linear_cross_entropy(hidden.detach(), weight, labels, vocab_size=V, group=None, chunk_tokens=4, **rules)
        (loss * torch.linspace(0.5, 2.0, T)).sum().backward()
    assert weight.grad is not None
    return getattr(weight, "main_grad", weight.grad), weight.grad


@pytest.mark.parametrize("name", ["plain", "all"])
def test_bf16_weights_accumulate_in_fp32(name: str) -> None:
    num = 16
    once, _ = accumulated(1, torch.float32, RULES[name])
    many, by_autograd = accumulated(num, torch.float32, RULES[name])
    assert error(many, num * once) < EXACT and not by_autograd.any()
    assert error(once, exact(RULES[name], torch.bfloat16)["weight"]) < 0.01
    assert (once != once.bfloat16()).any()  # more digits than a bf16 gradient has
    wrong, _ = accumulated(num, None, RULES[name])
    assert error(wrong, num * once) > 1e-3


def test_a_narrow_buffer_is_left_to_the_hook() -> None:
    """bf16 sums are made once per micro-batch, from an fp32 gradient, not once per piece."""
    buffer, gradient = accumulated(1, torch.bfloat16, {})
    assert not buffer.any() and gradient.any()


def test_the_mark_tells_megatron_core_what_is_done() -> None:
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None)
    loss.sum().backward(retain_graph=True)
    assert not hasattr(weight, "grad_added_to_main_grad")
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    loss.sum().backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert error(weight.main_grad, weight.grad) < EXACT  # type: ignore[attr-defined, arg-type]
