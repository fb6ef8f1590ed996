"""FP8 in the language model on one rank: which layers, when, with which tokens in the scales, and that it is FP8."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from megatron_vlm.ops import fp8
from tests.helpers.models.llama import batch
from tests.helpers.ranks.solo import LLAMA, one_rank, small_recipe

GEMMS_PER_LAYER = 4


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def build(grid: Any, changes: dict[str, Any] | None = None, sections: dict[str, Any] | None = None, **precision: Any):
    """A model with seeded weights, in training mode."""
    from megatron_vlm.models.language import build_language_chunks

    sections = {"precision": {"params": "fp32", **precision}, **(sections or {})}
    config = small_recipe(changes, sections)
    chunk = build_language_chunks(config, AutoConfig.for_model(**{**LLAMA, **(changes or {})}), grid)[0]
    generator = torch.Generator().manual_seed(3)
    for parameter in chunk.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    return chunk.train()


def run(model: Any, ids: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients."""
    model.zero_grad()
    losses = model(ids, positions, labels=labels)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({}, {}), ({}, {"fp8_gradients": "e5m2"}), ({"model_type": "qwen2"}, {}), ({"tie_word_embeddings": True}, {})],
)
def test_losses_and_gradients_are_near_those_without(grid: Any, changes: Any, precision: Any) -> None:
    inputs = batch(LLAMA["vocab_size"])
    expected, gradients = run(build(grid, changes), *inputs)
    found, quantised = run(build(grid, changes, fp8="tensorwise", **precision), *inputs)
    assert 1e-4 < distance(found, expected) < 0.1
    assert gradients.keys() == quantised.keys()
    for name, gradient in gradients.items():
        assert distance(quantised[name], gradient) < 0.5, name


@pytest.mark.parametrize(
    ("exclude", "included"), [({}, (1, 2, 3, 4)), ({"first": 1}, (2, 3, 4)), ({"first": 1, "last": 2}, (2,))]
)
def test_excluded_layers_and_the_head_do_not_multiply_in_fp8(grid: Any, exclude: Any, included: Any) -> None:
    model = build(grid, fp8="tensorwise", fp8_exclude=exclude)
    weights = {id(parameter): name for name, parameter in model.named_parameters() if name.endswith("weight")}
    seen: list[str] = []
    plain = fp8.fp8_linear

    def spy(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen.append(weights[id(weight)])
        return plain(x, weight, **options)

    with mock.patch("megatron_vlm.models.fp8.fp8_linear", spy):
        run(model, *batch(LLAMA["vocab_size"]))
    expected = [
        f"decoder.layers.{number - 1}.{part}.weight"
        for number in included
        for part in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ]
    assert seen == expected


def test_only_training_is_in_fp8(grid: Any) -> None:
    ids, positions, labels = batch(LLAMA["vocab_size"])
    plain, quantised = build(grid), build(grid, fp8="tensorwise")
    torch.testing.assert_close(
        quantised.eval()(ids, positions, labels=labels), plain.eval()(ids, positions, labels=labels), rtol=0, atol=0
    )
    assert distance(quantised.train()(ids, positions, labels=labels), plain(ids, positions, labels=labels)) > 1e-4


def test_parameters_are_the_same_as_without(grid: Any) -> None:
    plain, quantised = build(grid), build(grid, fp8="tensorwise")
    assert list(plain.state_dict()) == list(quantised.state_dict())
    assert {p.dtype for p in quantised.parameters()} == {torch.float32}
    assert quantised.config.fp8 is None, "megatron-core would quantise nothing by it"


def padded(model: Any, num_tokens: int = 7) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A batch, and the same with tokens behind which are all in one channel: no norm makes that small."""
    ids, positions, labels = batch(LLAMA["vocab_size"] - 1)
    pad = LLAMA["vocab_size"] - 1
    with torch.no_grad():
        model.embedding.word_embeddings.weight[pad] = 0.0
        model.embedding.word_embeddings.weight[pad, 5] = 100.0
    rows = len(ids)
    behind = torch.arange(num_tokens)[None] + positions.shape[1]
    longer = (
        torch.cat([ids, torch.full((rows, num_tokens), pad)], 1),
        torch.cat([positions, behind.expand(rows, -1)], 1),
        torch.cat([labels, torch.full((rows, num_tokens), -100)], 1),
    )
    labels = labels.clone()
    labels[:, -1] = 0  # the last true token is trained, so that all of them count
    longer[2][:, labels.shape[1] - 1] = 0
    return (ids, positions, labels), longer


def scales_of(model: Any, inputs: tuple[Tensor, ...]) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """Every scale in order, losses, gradients."""
    scales: list[float] = []
    plain = fp8.quantise

    def spy(*arguments: Any, **options: Any) -> Any:
        found = plain(*arguments, **options)
        scales.append(float(found.scale))
        return found

    with mock.patch.object(fp8, "quantise", spy):
        return scales, *run(model, *inputs)


@pytest.mark.parametrize("recompute", ("none", "full"))
def test_padding_changes_neither_loss_nor_scales(grid: Any, recompute: str) -> None:
    sections = {"training": {"steps": 1, "sequence_length": 64, "recompute": {"language": recompute}}}
    model = build(grid, None, sections, fp8="tensorwise")
    inputs, longer = padded(model)
    scales, losses, gradients = scales_of(model, inputs)
    found_scales, found, quantised = scales_of(model, longer)
    assert found_scales == scales and len(set(scales)) > 3
    torch.testing.assert_close(found[:, : losses.shape[1]], losses, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert distance(quantised[name], gradient) < 1e-3, name
    with mock.patch("megatron_vlm.models.language.counted_tokens", lambda *_: None):
        assert scales_of(model, longer)[0] != scales, "the test sees no padding"


def test_a_recomputed_layer_sees_its_own_tokens(grid: Any) -> None:
    """Two micro-batches forward, then both backward, as a pipeline runs them: the first is recomputed last."""
    from megatron_vlm.models.language import AttentionContext

    def gradients(recompute: str) -> dict[str, Tensor]:
        sections = {"training": {"steps": 1, "sequence_length": 64, "recompute": {"language": recompute}}}
        model = build(grid, None, sections, fp8="tensorwise")
        inputs, longer = padded(model)
        first, second = (model(ids, positions, labels=labels) for ids, positions, labels in (longer, inputs))
        second.sum().backward()
        first.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert "counted" in AttentionContext.__dataclass_fields__
    plain, recomputed = gradients("none"), gradients("full")
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_that_are_not_finite_reach_the_weights(grid: Any) -> None:
    model = build(grid, fp8="tensorwise")
    ids, positions, labels = batch(LLAMA["vocab_size"])
    losses = model(ids, positions, labels=labels)
    (losses.sum() * float("inf")).backward()
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
